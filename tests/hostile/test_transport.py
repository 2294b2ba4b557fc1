"""Bytes and descriptors that lie, from either side: refused before anything is touched, and nobody else is harmed."""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import os
import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport import wire
from vllm_tap.transport.segment import server as segment_server
from vllm_tap.transport.segment.memory import SEAL_GROW, SEAL_SEAL, SEAL_SHRINK
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer

MIB = 1 << 20
SIZE = 64 * 1024
BOTH = SEAL_SHRINK | SEAL_GROW
HELLO = struct.pack("<4sHHII16s", b"vtap", 1, 0, 1, 4711, b"p" * 16)
"""Written out here, so that a change of the format shows."""


def memfd(nbytes: int, seals: int) -> int:
    """Return a memfd of a size with seals."""
    fd = os.memfd_create("vllm-tap-hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


class LyingWorker:
    """A socket that greets, and answers every request with the same packet and descriptors."""

    def __init__(self, answer: bytes, fds: list[int], hello: bytes = HELLO) -> None:
        self.address = f"vllm-tap-test-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(f"\0{self.address}")
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._run, args=(answer, fds, hello), daemon=True)
        self._thread.start()

    def _run(self, answer: bytes, fds: list[int], hello: bytes) -> None:
        connection, _ = self._listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.send(hello)
            while connection.recv(65536):
                socket.send_fds(connection, [answer], fds)

    def close(self) -> None:
        """Wait for the client to go."""
        self._thread.join(10)
        self._listener.close()


@pytest.fixture
def lie() -> Iterator[Callable[..., SegmentReader]]:
    """A function that connects a reader to a worker with a given answer; checks that no descriptor is left."""
    before = len(os.listdir("/proc/self/fd"))
    opened: list[tuple[LyingWorker, SegmentReader, list[int]]] = []

    def connect(answer: bytes, fds: list[int]) -> SegmentReader:
        worker = LyingWorker(answer, fds)
        opened.append((worker, SegmentReader(worker.address, timeout_s=5), fds))
        return opened[-1][1]

    yield connect
    for worker, reader, fds in opened:
        reader.close()
        worker.close()
        for fd in fds:
            os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before


def mapped(segment_id: int, nbytes: int, kind: int = 3) -> bytes:
    """Return the packet of a worker that hands over a segment."""
    return struct.pack("<IQQ", kind, segment_id, nbytes)


def test_a_sealed_segment_is_accepted(lie):
    """The honest answer works, so that the refusals below have one reason each."""
    reader = lie(mapped(1, SIZE), [memfd(SIZE, BOTH)])
    assert reader.lease(Block(1, 4096, 100, 1)).array.nbytes == 100


@pytest.mark.parametrize("seals", [0, SEAL_SHRINK, SEAL_GROW, SEAL_SEAL])
def test_unsealed_memory_is_refused(lie, seals):
    """Memory that the worker could shrink would crash the reader later."""
    with pytest.raises(DescriptorError, match="has seals"):
        lie(mapped(1, SIZE), [memfd(SIZE, seals)]).lease(Block(1, 0, 100, 1))


def test_files_and_pipes_are_refused(lie, tmp_path):
    """A descriptor that is no memfd is not mapped."""
    (tmp_path / "file").write_bytes(bytes(SIZE))
    with pytest.raises(DescriptorError, match="has seals 0x0"):
        lie(mapped(1, SIZE), [os.open(tmp_path / "file", os.O_RDWR)]).lease(Block(1, 0, 100, 1))
    reading, writing = os.pipe()
    os.close(writing)
    with pytest.raises(DescriptorError, match="has seals 0x0"):
        lie(mapped(1, SIZE), [reading]).lease(Block(1, 0, 100, 1))


@pytest.mark.parametrize("claimed", [0, SIZE - 1, SIZE + 4096, 1 << 40, (1 << 64) - 1])
def test_a_size_that_is_not_the_files_is_refused(lie, claimed):
    """What the worker says of the size has to be what the kernel says."""
    with pytest.raises(DescriptorError, match="the worker said"):
        lie(mapped(1, claimed), [memfd(SIZE, BOTH)]).lease(Block(1, 0, 100, 1))


def test_an_empty_segment_is_refused(lie):
    """A segment of no bytes cannot be mapped and is no answer."""
    with pytest.raises(DescriptorError, match="0 bytes"):
        lie(mapped(1, 0), [memfd(0, BOTH)]).lease(Block(1, 0, 100, 1))


@pytest.mark.parametrize("num_fds", [0, 2])
def test_one_descriptor_is_expected(lie, num_fds):
    """An answer without a descriptor, or with several, is refused, and none of them stays open."""
    with pytest.raises(DescriptorError, match=f"{num_fds} file descriptors"):
        lie(mapped(1, SIZE), [memfd(SIZE, BOTH) for _ in range(num_fds)]).lease(Block(1, 0, 100, 1))


def test_another_segment_than_asked_for_is_refused(lie):
    """The answer has to name the segment of the request."""
    with pytest.raises(DescriptorError, match="segment 1 was asked for"):
        lie(mapped(2, SIZE), [memfd(SIZE, BOTH)]).lease(Block(1, 0, 100, 1))


@pytest.mark.parametrize("packet", [b"x", mapped(1, SIZE)[:-1], mapped(1, SIZE) + b"x", mapped(1, SIZE, kind=9)])
def test_malformed_answers_are_refused(lie, packet):
    """A packet of another length or kind is not guessed at."""
    with pytest.raises(DescriptorError, match="a packet of the worker"):
        lie(packet, [memfd(SIZE, BOTH)]).lease(Block(1, 0, 100, 1))


@pytest.mark.parametrize(
    "hello", [b"x", HELLO[:-1], HELLO + b"x", b"XXXX" + HELLO[4:], HELLO[:4] + b"\x02\x00" + HELLO[6:]]
)
def test_a_strange_hello_is_refused(hello):
    """Another protocol or version is refused when connecting."""
    worker = LyingWorker(b"", [], hello)
    with pytest.raises(DescriptorError, match="worker"):
        SegmentReader(worker.address)
    worker.close()


def test_a_silent_worker_is_given_up():
    """A worker that accepts and says nothing costs the time allowed, not forever."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = f"vllm-tap-test-{secrets.token_hex(8)}"
    listener.bind(f"\0{address}")
    listener.listen(1)
    with pytest.raises(TransportError, match="did not answer within"):
        SegmentReader(address, timeout_s=0.05)
    listener.close()


def test_nobody_at_the_address_says_what_to_do():
    """A worker on another host, or in another container, is named as the likely cause."""
    with pytest.raises(TransportError, match=r'network namespace.* transport="inline"'):
        SegmentReader("vllm-tap-nobody-listens-here")


OUT_OF_BOUNDS = [
    Block(1, SIZE, 1, 1),
    Block(1, SIZE - 99, 100, 1),
    Block(1, 0, SIZE + 1, 1),
    Block(1, 1 << 62, 1 << 62, 1),
    Block(1, (1 << 64) - 100, 200, 1),
    Block(1, -1, 100, 1),
    Block(1, -4096, 8192, 1),
    Block(1, 0, 0, 1),
    Block(1, 0, -1, 1),
    Block(1, 0, 100, 0),
    Block(1, 0, 100, -1),
    Block(1, 0, 100, 1 << 64),
    Block(0, 0, 100, 1),
    Block(-1, 0, 100, 1),
    Block(1 << 64, 0, 100, 1),
    Block(1, 0.0, 100, 1),
    Block(1, 0, "100", 1),
    Block(1, 0, 100, None),
    Block(True, 0, 100, 1),
]


@pytest.mark.parametrize("block", OUT_OF_BOUNDS, ids=repr)
def test_blocks_outside_their_segment_are_refused(lie, block):
    """No number in a descriptor leads outside the mapping, and a refused block is not released in its name."""
    reader = lie(mapped(1, SIZE), [memfd(SIZE, BOTH)])
    reader.segment_array(1)
    with pytest.raises(DescriptorError, match="block"):
        reader.lease(block)


@given(offset=st.integers(-(2**65), 2**65), nbytes=st.integers(-(2**65), 2**65))
def test_a_lease_is_inside_or_refused(offset, nbytes):
    """Whatever the numbers, a lease lies inside its segment or is a DescriptorError."""
    reader, server, pool = connected_pair()
    whole = reader.segment_array(1)
    inside = 0 <= offset <= offset + nbytes <= whole.nbytes and nbytes > 0
    try:
        leased = reader.lease(Block(1, offset, nbytes, 77)).array
    except DescriptorError:
        assert not inside
    else:
        assert inside
        assert leased.ctypes.data - whole.ctypes.data == offset
        del leased
    finish(reader, server, pool)


def connected_pair() -> tuple[SegmentReader, SegmentServer, SegmentPool]:
    """Return a reader and a server with one small segment."""
    pool = SegmentPool(4 * MIB, segment_bytes=2 * MIB)
    pool.reserve(1)
    server = SegmentServer(lambda _: pool)
    return SegmentReader(server.address, timeout_s=5), server, pool


def finish(reader: SegmentReader, server: SegmentServer, pool: SegmentPool) -> None:
    """Close all three."""
    reader.close()
    server.close()
    pool.close()


@pytest.fixture
def served() -> Iterator[tuple[SegmentReader, SegmentServer, SegmentPool]]:
    """An honest reader, its server and the pool."""
    triple = connected_pair()
    yield triple
    finish(*triple)


def assert_serves(reader: SegmentReader, server: SegmentServer, pool: SegmentPool) -> None:
    """Check that the honest reader gets its bytes and its leases end."""
    before = pool.stats().num_blocks
    block = pool.reserve(5000)
    expected = secrets.token_bytes(5000)
    pool.view(block)[:] = expected
    server.publish(reader.client, [block.block_id])
    assert reader.lease(block).array.tobytes() == expected
    wait_until(lambda: pool.stats().num_blocks == before)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


def intruder(server: SegmentServer) -> tuple[socket.socket, int]:
    """Connect by hand; return the socket and the client number."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(f"\0{server.address}")
    connection.settimeout(10)
    return connection, wire.Hello.decode(connection.recv(100)).client


def was_closed(connection: socket.socket) -> bool:
    """Wait for the server to end a connection; True when it did."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionResetError:
        pass
    connection.close()
    return True


MALFORMED = [
    b"x",
    struct.pack("<I", 1),
    struct.pack("<I", 2),
    struct.pack("<IQ", 0, 1),
    struct.pack("<IQ", 9, 1),
    struct.pack("<IQQ", 1, 1, 1),
    struct.pack("<IQ", 2, 1) + b"x",
    struct.pack("<I4097Q", 2, *range(4097)),
    bytes(100_000),
]


@pytest.mark.parametrize("packet", MALFORMED, ids=lambda p: f"{len(p)}-bytes-{p[:12].hex()}")
def test_a_malformed_request_ends_that_connection_only(served, packet):
    """Who sends what the protocol does not have is disconnected, its blocks are freed, and the others are served."""
    _, server, pool = served
    connection, number = intruder(server)
    block = pool.reserve(10)
    server.publish(number, [block.block_id])
    connection.send(packet)
    assert was_closed(connection)
    wait_until(lambda: pool.stats().num_blocks == 1)  # the first block of the pool
    assert not server.is_connected(number)
    assert_serves(*served)


def test_random_packets_do_not_stop_the_server(served):
    """Thousands of random packets, well-formed ones among them, leave the honest client as it was."""
    reader, server, pool = served
    mine = pool.reserve(1000)
    server.publish(reader.client, [mine.block_id])
    chance = random.Random(0)
    connection, _ = intruder(server)
    for _ in range(3000):
        body = chance.randbytes(chance.choice([0, 1, 4, 12, 12, 20, 100]))
        packet = struct.pack("<I", chance.choice([1, 2, 2, 2, 3, 255])) + body if chance.random() < 0.7 else body
        if not packet:
            continue
        try:
            connection.send(packet)
        except (BrokenPipeError, ConnectionResetError):
            connection.close()
            connection, _ = intruder(server)
    connection.close()
    assert pool.release(mine.block_id)
    assert_serves(*served)


def test_releases_of_others_blocks_are_ignored(served):
    """A client that guesses block numbers frees nothing that is not its own."""
    reader, server, pool = served
    mine = pool.reserve(1000)
    server.publish(reader.client, [mine.block_id])
    connection, number = intruder(server)
    theirs = pool.reserve(1000)
    server.publish(number, [theirs.block_id])
    connection.send(struct.pack("<I200Q", 2, *range(200)))
    wait_until(lambda: pool.stats().num_blocks == 2)  # the first block of the pool, and mine
    assert pool.release(mine.block_id)
    connection.close()


def test_descriptors_that_a_client_sends_are_not_kept(served):
    """Sending descriptors to the server opens nothing there."""
    _, server, _ = served
    connection, _ = intruder(server)
    assert_serves(*served)  # the reader keeps a descriptor of each segment that it has mapped
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))]
        connection.sendmsg([struct.pack("<IQ", 2, 12345)], rights)
    assert_serves(*served)
    assert len(os.listdir("/proc/self/fd")) == before
    connection.close()


def test_a_client_that_does_not_read_holds_up_nobody(served):
    """Thousands of requests whose answers are never read are kept for that client; others get theirs."""
    _, server, _ = served
    connection, number = intruder(server)
    connection.setblocking(False)
    sent = 0
    while sent < 3000:
        try:
            connection.send(struct.pack("<IQ", 1, 1))
            sent += 1
        except BlockingIOError:
            assert_serves(*served)
    assert_serves(*served)
    assert server.is_connected(number)
    connection.settimeout(10)
    for _ in range(3000):
        packet, fds, _, _ = socket.recv_fds(connection, 100, 4)
        assert packet == struct.pack("<IQQ", 3, 1, 2 * MIB)
        assert len(fds) == 1
        os.close(fds[0])
    connection.close()


def test_a_segment_that_does_not_exist_is_not_handed_over(served):
    """A client that asks for a segment of another number gets an answer without a descriptor."""
    reader, _, _ = served
    with pytest.raises(DescriptorError, match="0 file descriptors"):
        reader.lease(Block(99, 0, 10, 1))
    assert_serves(*served)


def test_memory_that_is_not_shared_is_not_handed_over():
    """A pool of private memory gives no descriptor to anybody."""
    pool = SegmentPool(4 * MIB, shared=False, segment_bytes=2 * MIB)
    block = pool.reserve(10)
    server = SegmentServer(lambda _: pool)
    reader = SegmentReader(server.address)
    with pytest.raises(DescriptorError, match="does not share it"):
        reader.lease(block)
    finish(reader, server, pool)


@pytest.mark.parametrize("others", [0, 1])
def test_a_server_without_descriptors_accepts_again_later(others, caplog, monkeypatch):
    """A failed accept is logged and tried again, also when nobody is connected who could leave."""
    real, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def accept(self: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return real(self)

    pool = SegmentPool(4 * MIB, segment_bytes=2 * MIB)
    server = SegmentServer(lambda _: pool)
    earlier = [SegmentReader(server.address) for _ in range(others)]
    monkeypatch.setattr(segment_server, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(socket.socket, "accept", accept)
    reader = SegmentReader(server.address)
    assert "Too many open files" in caplog.text
    for each in (*earlier, reader):
        assert_serves(each, server, pool)
    for each in earlier:
        each.close()
    finish(reader, server, pool)


def test_a_segment_for_which_there_is_no_descriptor_is_refused_alone(served, caplog, monkeypatch):
    """The client is told, and its connection stands: the next lease finds the segment."""
    reader, server, pool = served
    block = pool.reserve(10)
    server.publish(reader.client, [block.block_id])

    def exhausted(segment_id: int) -> None:
        raise OSError(errno.EMFILE, f"Too many open files for {segment_id}")

    with monkeypatch.context() as patch:
        patch.setattr(pool, "duplicate_fd", exhausted)
        with pytest.raises(DescriptorError, match="no descriptor left"):
            reader.lease(block)
    assert "Too many open files" in caplog.text
    assert reader.alive
    pool.release(block.block_id)
    assert_serves(*served)


def test_on_disconnect_may_fail(served, caplog):
    """An exception in the callback is logged, and the server goes on."""
    _, server, _ = served

    def fail(client: int) -> None:
        raise RuntimeError(f"no {client}")

    server.on_disconnect = fail
    connection, number = intruder(server)
    connection.close()
    wait_until(lambda: not server.is_connected(number))
    assert_serves(*served)
    wait_until(lambda: f"on_disconnect failed for client {number}" in caplog.text)
