"""An engine without processes of its own, as debuggers use it. Runs the whole of it in a process beside the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runners import python_path

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

PROGRAM = """
import gc, os, sys, threading, weakref
from engine.engines import TRANSPORTS, Engine, References, compare, prompts, wait_until
from pathlib import Path
from vllm_tap import Spec, shutdown
from vllm_tap.engine.capture import idle

idle.PoolKeeper.poll_seconds = 0.1
engine = Engine(Path(sys.argv[1]), enforce_eager=True, listens=True)
assert engine.status()[0]["pid"] == os.getpid()
known = References(Path(sys.argv[1]))
for transport in TRANSPORTS:
    result = engine.capture(prompts(), Spec(hidden_states="all"), transport=transport)
    compare(result, known)
    assert (engine.used_bytes() > 0) == (transport == "segment")
    del result
    wait_until(lambda: engine.used_bytes() == 0, "the release of all rows")

assert engine.status()[0]["capacity_bytes"] > 0
idle.POOL_LINGER_SECONDS = 0.0
wait_until(lambda: engine.status()[0]["capacity_bytes"] == 0, "the release of the host's memory")

core = engine.llm.llm_engine.engine_core.engine_core
layer = weakref.ref(core.model_executor.driver_worker.worker.model_runner.get_model().model.layers[1])
del core
result = engine.capture(prompts(), Spec(hidden_states="all"))
if not hasattr(engine.llm.llm_engine.engine_core, "_finalizer"):  # older vLLM keeps such an engine until it is ended
    shutdown(engine.llm)
engine.llm = None
try:
    wait_until(lambda: gc.collect() >= 0 and layer() is None, "the end of a layer", 5)
except AssertionError:
    for one in gc.get_referrers(layer()):
        print(type(one), [type(two) for two in gc.get_referrers(one)], file=sys.stderr)
    raise
compare(result, known)
listeners = {"vllm-tap-segments", "vllm-tap-calls", "vllm-tap-keeper", "vllm-tap-network", "vllm-tap-pulses"}
wait_until(lambda: not listeners & {thread.name for thread in threading.enumerate()}, "the end of threads")
"""


def test_rows_of_an_engine_in_the_same_process(tiny_model: Callable[..., Path]):
    """Worker and client in one process: rows are right by every transport, and free when they are dropped.

    Memory of the host goes some time after the last capture, and is there again in the next. An engine that is let go
    of takes its layers and threads along, and leaves the rows.
    """
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONPATH": python_path()}
    command = [sys.executable, "-c", PROGRAM, str(tiny_model("llama"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
