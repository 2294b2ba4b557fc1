"""The CUDA side under a real engine, on a simulated device: every row against Hugging Face.

Runs in processes beside the tests, whose engines' workers take the simulated device for their own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.engines import FULL_MATRIX
from runners import simulated_environment

pytestmark = pytest.mark.engine

PROGRAM = """
import sys
from pathlib import Path

from engine.engines import Engine, References, compare, prompts
from routing import check_followed
from vllm_tap import Spec
from vllm_tap.client.connection import connect

if __name__ == "__main__":
    family, runner, folder = *sys.argv[1:3], Path(sys.argv[3])
    engine, known = Engine(folder, enforce_eager=True), References(folder)
    assert [hello.runner for hello in connect(engine.llm).hellos] == [runner]
    layers = dict.fromkeys(("hidden_states", "attention_output", "mlp_output"), "all")
    streams = {**layers, "embeddings": True, "final_hidden_states": True}
    if family == "qwen3_moe":
        streams["router_logits"] = "all"
    for staging in ("staged", "direct"):
        result = engine.capture(prompts([3, 70, 1]), Spec(**streams), staging=staging, max_tokens=4)
        (state,) = engine.status()
        assert state["staging_bytes"] > 0, state  # kept for the next capture, and for ten seconds
        compare(result, known)
    generated = engine.capture(prompts([9, 70]), Spec(hidden_states=[-1], positions="generated"))
    compare(generated, known, lambda prompt_len, num_rows: list(range(prompt_len, num_rows)))
    if family == "qwen3_moe":
        check_followed(engine.capture(prompts([5, 2]), Spec(router_logits="all", routed_experts="all"), max_tokens=3))
    engine.close()
"""

ENGINES = [("qwen3_moe", "V1"), *([("llama", "V1"), ("llama", "V2")] if FULL_MATRIX else [])]


@pytest.mark.parametrize(("family", "runner"), ENGINES)
def test_rows_by_way_of_a_device(tiny_model: Callable[..., Path], tmp_path: Path, family: str, runner: str):
    """Rows that are staged, rows that are stored at once, of steps that mix prompts and single tokens."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), family, runner, str(tiny_model(family))]
    log = tmp_path / "log"
    done = subprocess.run(
        command, env=simulated_environment(runner), stdout=log.open("w"), stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, log.read_text()
