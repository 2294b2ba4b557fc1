"""Two data parallel engines over a model with experts: each captures its own requests, every row against Hugging Face.

Their forward passes meet in every layer, so while one has nothing to do it runs dummy passes, whose rows are nobody's.
Each runs in a process of its own beside the tests, with the collectives that vLLM's CPU lacks.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runners import data_parallel_environment

pytestmark = pytest.mark.engine

NUM_ENGINES = 2

PROGRAM = """
import sys
from pathlib import Path

from engine.engines import Engine, References, compare, prompts, sequence
from engine.test_experts import check_choice
from vllm_tap import Spec

if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    engine, known = Engine(folder, enforce_eager=True), References(folder)
    parallel = engine.llm.llm_engine.vllm_config.parallel_config
    assert (parallel.data_parallel_size, parallel.data_parallel_rank) == (2, rank)
    # Chunks of 64 tokens on one side while the other decodes, and decoding on one while the other is done.
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


def test_rows_of_data_parallel_engines(tiny_model: Callable[..., Path], tmp_path: Path):
    """All streams of both engines are right, also of steps in which the other has none or other numbers of rows."""
    program, port = tmp_path / "program.py", free_port()
    program.write_text(PROGRAM)
    folder = str(tiny_model("qwen3_moe"))
    logs = [tmp_path / f"rank{rank}.log" for rank in range(NUM_ENGINES)]
    processes = [
        subprocess.Popen(
            [sys.executable, str(program), folder, str(rank)],
            env=data_parallel_environment(rank, NUM_ENGINES, port),
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        for process, log in zip(processes, logs, strict=True):
            assert process.wait() == 0, log.read_text()
    finally:
        for process in processes:
            process.terminate()  # where one failed, the other waits for it
