"""A client that is killed with rows in its hands, in a process of its own beside the tests; the engine is its child."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from engine.engines import wait_until
from runners import python_path

pytestmark = pytest.mark.engine

RELEASE_S = 1.0
CONNECTED = "03"

PROGRAM = """
import sys
from pathlib import Path
from engine.engines import Engine, prompts
from vllm_tap import Spec
from vllm_tap.client.connection import connect

engine = Engine(Path(sys.argv[1]), enforce_eager=True)
result = engine.capture(prompts(), Spec(hidden_states="all"))
assert engine.used_bytes() > 0
print("holds", connect(engine.llm).hellos[0].address, flush=True)
sys.stdin.read()
"""


class Client(NamedTuple):
    """A process that holds rows, the address at which their worker serves it, and its folder for temporary files."""

    process: subprocess.Popen[str]
    address: str
    folder: Path


@pytest.fixture
def folder() -> Iterator[Path]:
    """An empty folder whose path is short: vLLM's sockets are named in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def client(tiny_model: Callable[..., Path], folder: Path) -> Iterator[Client]:
    """A client with an engine of its own; what is left of the engine afterwards is ended."""
    environment = os.environ | {"PYTHONPATH": python_path(), "TMPDIR": str(folder)}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tiny_model("llama"))],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    said = next((line.split()[1] for line in process.stdout if line.startswith("holds ")), "")
    assert said, f"the client ended with status {process.wait()} before it held rows"
    family = psutil.Process(process.pid).children(recursive=True)
    yield Client(process, said, folder)
    for member in family:
        if member.is_running():
            member.kill()
    psutil.wait_procs(family, timeout=10)
    process.kill()
    process.wait()


def sockets(address: str) -> list[str]:
    """Return the states of the sockets that carry a name, in the whole system."""
    lines = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    return [fields[5] for fields in lines if fields[-1] == f"@{address}"]


def names_of_ours(folder: Path) -> list[Path]:
    """Return files that this package could have made."""
    return [path for path in folder.rglob("*") if "vllm-tap" in path.name or "vllm_tap" in path.name]


def test_a_killed_client_leaves_nothing(client):
    """Within a second its worker has let go of the connection, and with it of all leases; no name is left anywhere.

    That the end of a connection frees every block is tested where blocks can be counted, in tests/process.
    """
    assert CONNECTED in sockets(client.address)
    os.kill(client.process.pid, signal.SIGKILL)
    wait_until(lambda: CONNECTED not in sockets(client.address), "the end of the connection", RELEASE_S)
    assert names_of_ours(client.folder) == names_of_ours(Path("/dev/shm")) == []
