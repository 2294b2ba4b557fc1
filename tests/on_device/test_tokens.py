"""Greedy tokens with a capture, without one, and without the plugin: sequence by sequence, in bfloat16.

Runs engines in processes of their own, without a core process: all prompts are there before the first step, so that
every run has the same batches, and the tokens of two of them differ only where something computes otherwise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import device
from runners import python_path

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

NUM_SEQUENCES = 500 if device.ON_CUDA else 40

PROGRAM = """
import json, sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    from engine.engines import Engine, greedy

    folder, count, out, captures = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "captures"
    engine = Engine(folder, dtype="bfloat16", enforce_eager=True, enable_prefix_caching=False,
                    max_num_seqs=64, max_num_batched_tokens=256)
    rng = np.random.default_rng(7)
    given = [{"prompt_token_ids": rng.integers(0, 256, rng.integers(1, 120)).tolist()} for _ in range(count)]
    found = {"plain": engine.generate(given, max_tokens=24), "control": engine.generate(given, max_tokens=24)}
    if captures:
        from vllm_tap import Spec
        from vllm_tap.client.connection import connect

        for name, spec in (("all layers", Spec(hidden_states="all", embeddings=True, final_hidden_states=True)),
                           ("last", Spec(hidden_states="all", positions="last"))):
            result = engine.capture(given, spec, max_tokens=24)
            found[name] = [list(output.outputs[0].token_ids) for output in result.outputs]
        found["runner"] = connect(engine.llm).hellos[0].runner
    out.write_text(json.dumps(found))
"""


def tokens(folder: Path, tmp_path: Path, captures: bool) -> dict[str, list[list[int]]]:
    """Run an engine with or without the plugin; return the tokens of each of its runs."""
    program, out = tmp_path / "program.py", tmp_path / f"{captures}.json"
    program.write_text(PROGRAM)
    ours = {"PYTHONPATH": python_path(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, str(program), str(folder), str(NUM_SEQUENCES), str(out)]
    done = subprocess.run(
        [*command, "captures" if captures else "plain"],
        env=os.environ | ours | {"VLLM_TAP": "1" if captures else "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())  # type: ignore[no-any-return]


def differing(one: list[list[int]], other: list[list[int]]) -> int:
    """Return how many sequences differ."""
    return sum(a != b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_a_capture_changes_no_token(
    tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    """None of the sequences differs, and none between two runs without a capture, which is the control.

    With graphs an engine without the plugin rounds otherwise: the compiler fuses operations that taps hold apart.
    """
    folder = tiny_model(family, "bfloat16")
    with_plugin, without = tokens(folder, tmp_path, True), tokens(folder, tmp_path, False)
    plain = with_plugin["plain"]
    counts = {
        "control": differing(plain, with_plugin["control"]),
        "control without the plugin": differing(without["plain"], without["control"]),
        "all layers": differing(plain, with_plugin["all layers"]),
        "last position": differing(plain, with_plugin["last"]),
        "without the plugin": differing(plain, without["plain"]),
    }
    with capsys.disabled():
        print(f"\ntokens: {family}, {with_plugin['runner']}: of {len(plain)} sequences differ {json.dumps(counts)}")
    if device.GRAPHS:
        del counts["without the plugin"]
    assert counts == dict.fromkeys(counts, 0)
