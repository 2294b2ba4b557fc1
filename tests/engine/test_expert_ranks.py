"""Experts shared out over two ranks: data, expert and tensor parallel engines, every row against Hugging Face.

Engines run in processes of their own beside the tests, with what vLLM's CPU lacks for it (see tests/experts). By
default experts are shared out by number; VLLM_TAP_TEST_MATRIX=full also cuts each in two between data parallel engines.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.engines import FULL_MATRIX
from runners import data_parallel_environment, expert_environment

pytestmark = pytest.mark.engine

NUM_RANKS = 2

PROGRAM = """
import json
import sys
from pathlib import Path

from engine.engines import Engine, References, compare, prompts, sequence
from engine.test_experts import check_choice
from vllm_tap import Spec

if __name__ == "__main__":
    folder, rank, arguments = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    engine, known = Engine(folder, enforce_eager=True, **arguments), References(folder)
    parallel = engine.llm.llm_engine.vllm_config.parallel_config
    assert parallel.enable_expert_parallel == arguments["enable_expert_parallel"]
    assert (parallel.world_size * parallel.data_parallel_size, parallel.data_parallel_rank) == (2, rank)
    # Chunks of 64 tokens in one engine while the other decodes, and decoding in one while the other is done.
    given, max_tokens = (prompts([3, 40], 1), 30) if rank == 0 else (prompts([150, 9, 70], 2), 8)
    states = Spec(hidden_states="all", router_logits="all", embeddings=True, final_hidden_states=True)
    compare(engine.capture(given, states, max_tokens=max_tokens), known)
    result = engine.capture(given, Spec(routed_experts="all"), max_tokens=max_tokens)
    for sample, output in zip(result, result.outputs, strict=True):
        for layer, logits in known.of(sequence(output)).router_logits.items():
            check_choice(result.routing[layer], logits, sample.expert_ids[layer], sample.expert_weights[layer])
    engine.close()
"""


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(folder: Path, place: Path, environments: list[dict[str, str]], **arguments: Any) -> None:
    """Run the program in a process for each environment, and fail with the log of one that fails."""
    program = place / "program.py"
    program.write_text(PROGRAM)
    logs = [place / f"rank{rank}.log" for rank in range(len(environments))]
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), str(folder), str(rank), json.dumps(arguments)],
            env=environment,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, (environment, log) in enumerate(zip(environments, logs, strict=True))
    ]
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait() == 0, log.read_text()
    finally:
        for process in processes:
            process.terminate()  # where one failed, the other waits for it


@pytest.mark.parametrize("by_number", [True, False] if FULL_MATRIX else [True])
def test_rows_of_data_parallel_engines(tiny_model: Callable[..., Path], tmp_path: Path, by_number):
    """All streams of both engines are right, also of steps in which the other has none or other numbers of rows.

    Their forward passes meet in every layer: while one has nothing to do it runs dummy passes, whose rows are nobody's.
    """
    port = free_port()
    environments = [data_parallel_environment(rank, NUM_RANKS, port) for rank in range(NUM_RANKS)]
    run(tiny_model("qwen3_moe"), tmp_path, environments, enable_expert_parallel=by_number)


def test_rows_where_tensor_parallel_ranks_have_experts_of_their_own(tiny_model: Callable[..., Path], tmp_path: Path):
    """Every rank chooses among all experts, for all rows, whichever of them it computes."""
    ranks = {"tensor_parallel_size": NUM_RANKS, "enable_expert_parallel": True}
    run(tiny_model("qwen3_moe"), tmp_path, [expert_environment(NUM_RANKS)], **ranks)
