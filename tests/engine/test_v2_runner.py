"""vLLM's V2 model runner, in Triton's interpreter: every row against Hugging Face.

Runs the whole of it in a process beside the tests, since the interpreter has to be chosen before anything is imported.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runners import v2_environment

pytestmark = pytest.mark.engine

PROGRAM = """
import sys
from pathlib import Path

from engine.engines import DENSE, Engine, References, compare, prompts
from vllm_tap import Positions, Spec
from vllm_tap.client.connection import connect

if __name__ == "__main__":
    engine = Engine(Path(sys.argv[1]), enforce_eager=True, block_size=32)
    known = References(Path(sys.argv[1]))
    assert [hello.runner for hello in connect(engine.llm).hellos] == ["V2"]
    compare(engine.capture(prompts(), Spec(**DENSE)), known)
    generated = engine.capture(prompts([9, 70]), Spec(hidden_states=[-1], positions="generated"))
    compare(generated, known, lambda prompt_len, num_rows: list(range(prompt_len, num_rows)))
    window = engine.capture(prompts([9, 70]), Spec(hidden_states=[1], positions=Positions.prompt(-20, -3)))
    compare(window, known, lambda prompt_len, num_rows: list(range(max(prompt_len - 20, 0), prompt_len - 3)))
    last = engine.capture(prompts([9, 70]), Spec(hidden_states=[1], positions="last"))
    compare(last, known, lambda prompt_len, num_rows: [prompt_len - 1])
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    for result, begin in ((generated, 70), (window, 50), (last, 69)):
        cached = [output.num_cached_tokens for output in result.outputs]
        assert cached == [0, 0 if result is generated else begin // block * block], (cached, block)
    engine.close()
"""


def test_rows_of_the_v2_runner(tiny_model: Callable[..., Path], tmp_path: Path):
    """All rows are right, also of prompts cut into chunks of 64 tokens, and those of chosen positions."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(tiny_model("llama"))]
    log = tmp_path / "log"
    done = subprocess.run(command, env=v2_environment(), stdout=log.open("w"), stderr=subprocess.STDOUT, check=False)
    assert done.returncode == 0, log.read_text()
