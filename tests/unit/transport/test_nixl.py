"""Rows by NIXL: its frames and its refusals, with an agent that reads this process's memory; NIXL itself is not needed.

The tests of every transport run over NIXL too where it is installed: `make test-nixl`.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest

from proxy import NEVER, Proxy
from transports import SECRET, NetworkWorker
from vllm_tap.errors import DescriptorError, SpecError, TransportError
from vllm_tap.transport.nixl import lane, reader, server
from vllm_tap.transport.nixl.agent import Agent, require_nixl
from vllm_tap.transport.nixl.reader import NixlReader
from vllm_tap.transport.tcp import settings
from vllm_tap.transport.tcp.settings import Settings

MIB = 1 << 20
SIZES = [1, 4095, 100_000, 20 * MIB]


class Copier:
    """An agent for two ends in one process: it copies what is registered, and nothing else.

    Attributes:
        registered: (address, length) of all agents.
        on_read: Called behind each read.
    """

    registered: ClassVar[set[tuple[int, int]]] = set()
    on_read: ClassVar[Callable[[], None]] = staticmethod(lambda: None)

    def __init__(self, is_local: bool) -> None:
        self.met = b""

    def register(self, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Count ranges as registered."""
        Copier.registered.update(ranges)
        return ranges

    def deregister(self, ranges: list[tuple[int, int]]) -> None:
        """Forget them."""
        Copier.registered.difference_update(ranges)

    def metadata(self, ranges: list[tuple[int, int]]) -> bytes:
        """Return what tells ranges from others."""
        return repr(ranges).encode()

    def meet(self, metadata: bytes) -> None:
        """Keep it."""
        self.met = metadata

    def read(self, theirs: list[tuple[int, int]], mine: list[tuple[int, int]], timeout_s: float) -> None:
        """Copy."""
        for (source, nbytes), (target, length) in zip(theirs, mine, strict=True):
            assert self.met
            assert nbytes == length
            for start in (source, target):
                assert any(a <= start and start + nbytes <= a + n for a, n in Copier.registered)
            ctypes.memmove(target, source, nbytes)
        Copier.on_read()

    def progress(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Worker(NetworkWorker):
    """A worker whose rows NIXL brings, unless it is told otherwise."""

    def __init__(self, **given: Any) -> None:
        terms = {"is_random": False, "tls": False, "nixl": True, **given}
        super().__init__(Settings("127.0.0.1", 0, SECRET, **terms), lambda data: data)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> type[Copier]:
    """`Copier` in the place of NIXL, at both ends."""
    for module in (lane, server):
        monkeypatch.setattr(module, "Agent", Copier)
    for module in (reader, server):
        monkeypatch.setattr(module, "require_nixl", lambda: None)
    monkeypatch.setattr(Copier, "registered", set())
    return Copier


@pytest.fixture
def start() -> Iterator[Callable[..., Worker]]:
    """A function that starts a worker."""
    workers: list[Worker] = []

    def make(**given: Any) -> Worker:
        workers.append(Worker(**given))
        return workers[-1]

    yield make
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
def test_blocks_arrive_unchanged_and_nothing_stays_registered(copies, start, tls):
    """Of many sizes and in many blocks; between two reads nobody can reach memory."""
    worker = start(tls=tls)
    given = NixlReader(worker.server.address, worker.access)
    for sizes in (SIZES, [100] * 1500):
        blocks, contents = worker.put(given, *sizes)
        held = given.hold(blocks)
        assert [held.lease(index).array.tobytes() for index in range(len(blocks))] == contents
        assert not copies.registered
    given.close()


def test_a_block_of_nobody_is_refused_and_the_next_one_arrives(copies, start):
    """Also a longer one than was published."""
    worker = start()
    given, other = (NixlReader(worker.server.address, worker.access) for _ in range(2))
    theirs = worker.put(other, *[1000] * 3)[0][-1]
    blocks, contents = worker.put(given, 1000, 1000)
    for bad in (theirs, blocks[0]._replace(nbytes=1001)):
        with pytest.raises(DescriptorError, match=f"of block {bad.block_id} for this client"):
            given.hold([bad])
    assert given.lease(blocks[1]).array.tobytes() == contents[1]
    assert other.alive


def test_bytes_of_a_session_that_ended_meanwhile_are_not_taken(copies, start, monkeypatch):
    """The worker may have given the memory to others while it was read: what came is no row."""
    worker = start()
    proxy = Proxy(worker.server.address)
    gone = threading.Event()
    worker.server.on_disconnect = lambda client: gone.set()
    given = NixlReader(proxy.address, worker.access)
    blocks, _ = worker.put(given, 1000)

    def end() -> None:
        proxy.reset()
        assert gone.wait(10)

    monkeypatch.setattr(copies, "on_read", staticmethod(end))
    with pytest.raises(TransportError, match="gone"):
        given.hold(blocks)
    assert not given.alive
    proxy.close()


def test_a_connection_that_breaks_is_made_anew(copies, start):
    """The session stands: rows are asked for again over another connection."""
    worker = start()
    proxy = Proxy(worker.server.address, lambda number: NEVER if number != 1 else 400)
    given = NixlReader(proxy.address, worker.access)
    for _ in range(3):
        blocks, contents = worker.put(given, *[500] * 20)
        held = given.hold(blocks)
        assert [held.lease(index).array.tobytes() for index in range(len(blocks))] == contents
    assert proxy.num_broken == 1
    given.close()
    proxy.close()


def test_what_is_not_there_is_refused_with_the_reason(start, monkeypatch):
    """No package here, none in the worker, a worker that was not told to, and a codec."""
    monkeypatch.setitem(sys.modules, "nixl", None)
    quiet, without = start(nixl=False), start()
    with pytest.raises(TransportError, match=r"needs NIXL here.*pip install vllm-tap\[nixl\]"):
        NixlReader(quiet.server.address, quiet.access)
    with pytest.raises(TransportError, match="needs NIXL here"):
        require_nixl()
    monkeypatch.setattr(reader, "require_nixl", lambda: None)
    with pytest.raises(TransportError, match="serves no NIXL: start it with VLLM_TAP_NIXL=1"):
        NixlReader(quiet.server.address, quiet.access)
    with pytest.raises(TransportError, match=r"serves no NIXL: .*pip install"):
        NixlReader(without.server.address, without.access)
    with pytest.raises(SpecError, match="leave codec='zstd' out"):
        NixlReader(quiet.server.address, quiet.access._replace(codec="zstd"))


def test_a_worker_serves_it_only_if_it_was_told_to():
    """A setting of its own, beside that of the address."""
    listen = {"VLLM_TAP_LISTEN": "127.0.0.1:0"}
    assert not settings.read(listen, 0).nixl
    assert settings.read({**listen, "VLLM_TAP_NIXL": "1"}, 0).nixl
    with pytest.raises(SpecError, match="VLLM_TAP_NIXL is 0 or 1"):
        settings.read({**listen, "VLLM_TAP_NIXL": "yes"}, 0)


@pytest.fixture
def agents() -> Iterator[tuple[Agent, Agent]]:
    """Two agents of NIXL, of which the first reads."""
    pytest.importorskip("nixl", exc_type=ImportError)
    mine, theirs, has_ended = Agent(is_local=True), Agent(is_local=True), threading.Event()

    def serve() -> None:
        while not has_ended.wait(1e-4):
            theirs.progress()

    serving = threading.Thread(target=serve)
    serving.start()
    yield mine, theirs
    has_ended.set()
    serving.join()
    mine.close()
    theirs.close()


def test_an_agent_listens_on_loopback_alone(agents):
    """UCX's own sockets, of both agents."""
    psutil = pytest.importorskip("psutil")
    listening = {at.laddr.ip for at in psutil.Process().net_connections("inet") if at.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::1"}


def test_a_read_of_memory_that_is_not_registered_fails(agents):
    """What an agent was not told of it does not read."""
    mine, theirs = agents
    source, target = np.arange(4096, dtype=np.uint8), np.zeros(4096, np.uint8)
    ranges = [(int(array.ctypes.data), array.nbytes) for array in (source, target)]
    registered, _ = theirs.register(ranges[:1]), mine.register(ranges[1:])
    mine.meet(theirs.metadata(registered))
    mine.read(ranges[:1], ranges[1:], 5.0)
    assert np.array_equal(source, target)
    with pytest.raises(TransportError, match="NIXL"):
        mine.read([(ranges[0][0] + (1 << 30), 100)], [(ranges[1][0], 100)], 5.0)
