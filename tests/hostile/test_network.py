"""Frames and blocks that lie over a network, from either side: refused, and nobody else is harmed."""

from __future__ import annotations

import contextlib
import errno
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

from transports import SECRET, connect, serve
from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.tcp import access, frames
from vllm_tap.transport.tcp import server as network_server
from vllm_tap.transport.tcp.access import Access, Credential, Gate
from vllm_tap.transport.tcp.address import Address, parse
from vllm_tap.transport.tcp.reader import NetworkReader
from vllm_tap.transport.tcp.server import NetworkServer
from vllm_tap.transport.tcp.stream import Stream

MIB = 1 << 20
ACCESS = Access(SECRET, tls=False, timeout_s=5.0)
HELLO = struct.pack("<II16s16s32s", 1, 4711, b"p" * 16, b"h" * 16, b"t" * 32)
FOUND, NO_BLOCK = 0, 1
"""Written out here, so that a change of the format shows."""


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


class LyingWorker:
    """Knows the secret and greets, and answers every request for rows with the same bytes."""

    def __init__(self, answer: bytes, hello: bytes = HELLO) -> None:
        self._answer, self._hello = answer, hello
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = str(Address(*self._listener.getsockname()))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        gate = Gate(SECRET, None, b"")
        stream, preface = gate.receive(connection)
        is_session = access.PREFACE.unpack(preface)[2] == access.SESSION
        try:
            gate.admit(stream, preface, b"" if is_session else b"t" * 32)
            if is_session:
                stream.sendall(self._hello)
            while connection.recv(65536):
                if not is_session:
                    stream.sendall(self._answer)
        except OSError:
            pass
        stream.close()

    def close(self) -> None:
        """Accept no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def lie() -> Iterator[Callable[[bytes], NetworkReader]]:
    """A function that connects a reader to a worker with a given answer."""
    opened: list[tuple[LyingWorker, NetworkReader]] = []

    def call(answer: bytes) -> NetworkReader:
        worker = LyingWorker(answer)
        opened.append((worker, NetworkReader(worker.address, ACCESS)))
        return opened[-1][1]

    yield call
    for worker, reader in opened:
        reader.close()
        worker.close()


def rows(status: int, codec: int, nbytes: int, content: bytes = b"") -> bytes:
    """Return the frame of a worker that answers a request."""
    return struct.pack("<HHIQ", status, codec, 0, nbytes) + content


def test_an_honest_answer_is_accepted(lie):
    """So that the refusals below have one reason each."""
    assert lie(rows(FOUND, 0, 100, b"x" * 100)).lease(Block(1, 0, 100, 1)).array.tobytes() == b"x" * 100


@pytest.mark.parametrize(
    "answer",
    [
        rows(FOUND, 0, 99, bytes(99)),
        rows(FOUND, 0, 101, bytes(101)),
        rows(FOUND, 0, 1 << 40),
        rows(FOUND, 0, (1 << 64) - 1),
        rows(FOUND, 1, 100, bytes(100)),
        rows(FOUND, 999, 100, bytes(100)),
        rows(NO_BLOCK, 0, 100, bytes(100)),
        rows(7, 0, 100, bytes(100)),
        b"\xff" * 16,
    ],
    ids=lambda answer: answer[:16].hex(),
)
def test_answers_to_something_else_are_refused(lie, answer):
    """Before memory is taken for them, and no bytes of them count as rows."""
    with pytest.raises(DescriptorError, match="the worker answered"):
        lie(answer).lease(Block(1, 0, 100, 1))


@pytest.mark.parametrize("encoded", [b"", b"\xff" * 10, bytes(400)], ids=len)
def test_encoded_rows_that_are_none_are_refused(encoded):
    """What a codec cannot decode to the bytes that were asked for is an error of the worker, not rows."""
    number = frames.CODECS.index("bytesplit")
    worker = LyingWorker(rows(FOUND, number, len(encoded), encoded))
    reader = NetworkReader(worker.address, ACCESS._replace(codec="bytesplit"))
    with pytest.raises(DescriptorError):
        reader.lease(Block(1, 0, 1000, 1))
    reader.close()
    worker.close()


@pytest.mark.parametrize("preface", [b"XXXX\x01\x00", b"vtpn\x02\x00"])
def test_another_protocol_or_version_is_refused(preface):
    """By its first bytes, when connecting."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        connection.sendall(preface + bytes(34))
        connection.recv(1000)
        connection.close()

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(DescriptorError, match="with the same vllm-tap"):
        NetworkReader(str(Address(*listener.getsockname())), ACCESS)
    listener.close()


def test_a_silent_worker_is_given_up():
    """One that accepts and says nothing costs the time allowed, not forever; one that is not there costs none."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = str(Address(*listener.getsockname()))
    with pytest.raises(TransportError, match="sends nothing"):
        NetworkReader(address, ACCESS._replace(timeout_s=0.05))
    listener.close()
    with pytest.raises(TransportError, match=r"no worker answers.*VLLM_TAP_LISTEN.*firewall"):
        NetworkReader(address, ACCESS)


@pytest.fixture(scope="module")
def pool() -> Iterator[SegmentPool]:
    """The pool of `served`."""
    pool = SegmentPool(16 * MIB, shared=False, segment_bytes=2 * MIB)
    yield pool
    pool.close()


@pytest.fixture
def served(pool: SegmentPool) -> Iterator[tuple[NetworkReader, NetworkServer, SegmentPool]]:
    """An honest reader, its server and the pool."""
    server = serve("tcp", pool)
    reader = connect(server.address)
    yield reader, server, pool
    reader.close()
    wait_until(lambda: not pool.stats().num_blocks)
    server.close()


def put(reader: NetworkReader, server: NetworkServer, pool: SegmentPool, nbytes: int) -> tuple[Block, bytes]:
    """Publish a block of random bytes; return it and these."""
    block, content = pool.reserve(nbytes), secrets.token_bytes(nbytes)
    pool.view(block)[:] = content
    server.publish(reader.client, [block.block_id])
    return block, content


def assert_serves(reader: NetworkReader, server: NetworkServer, pool: SegmentPool) -> None:
    """Check that the honest reader gets its bytes, which are free at once."""
    before = pool.stats().num_blocks
    block, content = put(reader, server, pool, 5000)
    assert reader.lease(block).array.tobytes() == content
    wait_until(lambda: pool.stats().num_blocks <= before)


NUMBERS = st.integers(-(2**65), 2**65) | st.integers(0, 6000)


def test_a_lease_is_of_bytes_of_the_block_or_refused(served):
    """Whatever the numbers: no bytes of another block, and none behind the end."""
    reader, server, pool = served

    @given(offset=NUMBERS, nbytes=NUMBERS, segment_id=NUMBERS, block_id=st.none() | NUMBERS)
    def check(offset: int, nbytes: int, segment_id: int, block_id: int | None) -> None:
        block, content = put(reader, server, pool, 5000)
        told = Block(segment_id, offset, nbytes, block.block_id if block_id is None else block_id)
        try:
            found = reader.lease(told).array.tobytes()
        except DescriptorError:
            reader.release([block.block_id])
            return
        assert told.block_id == block.block_id
        assert found == content[:nbytes]
        assert len(found) == nbytes

    check()
    assert_serves(*served)


def intruder(server: NetworkServer) -> tuple[Stream, frames.Hello]:
    """Connect by hand; return the session and what the worker says."""
    stream = access.connect(parse(server.address), ACCESS, access.SESSION)
    return stream, frames.Hello.decode(stream.recv_exactly(frames.HELLO.size))


def rows_of(server: NetworkServer, hello: frames.Hello) -> Stream:
    """Return a connection for rows of a client."""
    return access.connect(parse(server.address), ACCESS, access.ROWS, Credential(hello.client, hello.token))


def has_ended(stream: Stream) -> bool:
    """Wait for the server to end a connection; True when it did."""
    try:
        while stream.recv(65536):
            pass
    except ConnectionResetError:
        pass
    stream.close()
    return True


SESSION_FRAMES = [struct.pack("<I", 0), struct.pack("<I", 4097), struct.pack("<I", 0xFFFFFFFF), b"\xff" * 100]
FETCH_FRAMES = [
    struct.pack("<HHIQQQ", 99, 1, 0, 1, 0, 10),
    struct.pack("<HHIQQQ", 0, 3, 0, 1, 0, 10),
    struct.pack("<HHIQQQ", 0, 1, 1, 1, 0, 10),
    struct.pack("<HHIQQQ", 0, 1, 0, 1, 0, 0),
    struct.pack("<HHIQQQ", 0, 1, 0, 1, 0, (16 << 20) + 1),
    b"\xff" * 32,
]


@pytest.mark.parametrize("frame", SESSION_FRAMES, ids=bytes.hex)
def test_a_malformed_frame_ends_that_session_alone(served, frame):
    """Who sends what the protocol does not have is disconnected, its blocks are freed, and the others are served."""
    _, server, pool = served
    session, hello = intruder(server)
    server.publish(hello.client, [pool.reserve(10).block_id])
    session.sendall(frame)
    assert has_ended(session)
    wait_until(lambda: not pool.stats().num_blocks)
    assert not server.is_connected(hello.client)
    assert_serves(*served)


@pytest.mark.parametrize("frame", FETCH_FRAMES, ids=bytes.hex)
def test_a_malformed_request_ends_that_connection_alone(served, frame):
    """Rows are asked for by numbers that can be."""
    _, server, _ = served
    session, hello = intruder(server)
    stream = rows_of(server, hello)
    stream.sendall(frame)
    assert has_ended(stream)
    assert server.is_connected(hello.client)
    assert_serves(*served)
    session.close()


@pytest.mark.parametrize(("offset", "nbytes"), [(0, 1001), (1000, 1), (1 << 63, 1), ((1 << 64) - 1, 2), (999, 2)])
def test_bytes_outside_a_block_are_not_to_be_had(served, offset, nbytes):
    """The worker says that it has none, whatever lies behind the block in its memory."""
    _, server, pool = served
    session, hello = intruder(server)
    block = pool.reserve(1000)
    server.publish(hello.client, [block.block_id])
    stream = rows_of(server, hello)
    stream.sendall(struct.pack("<HHIQQQ", 0, 1, 0, block.block_id, offset, nbytes))
    assert stream.recv_exactly(16) == rows(NO_BLOCK, 0, 0)
    for each in (stream, session):
        each.close()


def test_random_frames_do_not_stop_the_server(served):
    """Hundreds of clients that know the secret and send anything leave the honest one as it was."""
    reader, server, pool = served
    mine, content = put(reader, server, pool, 1000)
    chance = random.Random(0)
    for _ in range(150):
        session, hello = intruder(server)
        stream = rows_of(server, hello)
        for end in (session, stream):
            end.sendall(chance.randbytes(chance.choice([1, 4, 12, 32, 200])))
            end.close()
    assert reader.lease(mine).array.tobytes() == content
    assert_serves(*served)


def test_releases_of_others_blocks_are_ignored(served):
    """A client that guesses block numbers frees nothing that is not its own."""
    reader, server, pool = served
    (mine, content), (session, hello) = put(reader, server, pool, 1000), intruder(server)
    theirs = pool.reserve(1000)
    server.publish(hello.client, [theirs.block_id])
    session.sendall(frames.encode_release(list(range(max(0, mine.block_id - 100), theirs.block_id + 1))))
    wait_until(lambda: pool.stats().num_blocks == 1)
    assert reader.lease(mine).array.tobytes() == content
    session.close()


def test_connections_for_rows_are_a_clients_own(served):
    """Whoever knows the secret, but not a client's token, gets none of its rows."""
    reader, server, pool = served
    put(reader, server, pool, 1000)
    for token in (b"", b"t" * 32):
        with pytest.raises(TransportError, match="the session with the worker"):
            access.connect(parse(server.address), ACCESS, access.ROWS, Credential(reader.client, token))


@pytest.mark.parametrize("role", [access.SESSION, access.CALLS, access.ROWS])
def test_a_client_without_the_secret_is_sent_a_nonce_and_nothing_else(served, role):
    """In every role: what it asks for behind a wrong proof is not answered, and the block stays its owner's."""
    reader, server, pool = served
    block, content = put(reader, server, pool, 1000)
    with socket.create_connection(parse(server.address)) as connection:
        connection.sendall(struct.pack("<4sHHI32s", b"vtpn", 1, role, reader.client, secrets.token_bytes(32)))
        assert connection.recv(40, socket.MSG_WAITALL)[:8] == b"vtpn\x01\x00\x00\x00"
        fetch = struct.pack("<HHIQQQ", 0, 1, 0, block.block_id, 0, block.nbytes)
        connection.sendall(secrets.token_bytes(32) + fetch)
        with contextlib.suppress(ConnectionResetError):
            assert not connection.recv(1)
    assert reader.lease(block).array.tobytes() == content


def test_a_client_that_does_not_read_holds_up_nobody(served):
    """Its rows wait for it, until its silence has lasted too long; others get theirs."""
    _, server, pool = served
    session, hello = intruder(server)
    block = pool.reserve(2 * MIB)
    server.publish(hello.client, [block.block_id])
    stream = rows_of(server, hello)
    for _ in range(20):
        stream.sendall(struct.pack("<HHIQQQ", 0, 1, 0, block.block_id, 0, block.nbytes))
    assert_serves(*served)
    assert server.is_connected(hello.client)
    for each in (stream, session):
        each.close()


def test_a_server_without_descriptors_accepts_again_later(served, caplog, monkeypatch):
    """A failed accept is logged and tried again."""
    reader, server, pool = served
    real, failures = socket.socket.accept, [OSError(errno.EMFILE, "Too many open files")]

    def accept(self: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return real(self)

    monkeypatch.setattr(network_server, "_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(socket.socket, "accept", accept)
    connect(server.address).close()  # it waits in accept already: the next one fails
    later = connect(server.address)
    assert "Too many open files" in caplog.text
    for each in (reader, later):
        assert_serves(each, server, pool)
    later.close()


def test_on_disconnect_may_fail(served, caplog):
    """An exception in the callback is logged, and the server goes on."""
    _, server, _ = served

    def fail(client: int) -> None:
        raise RuntimeError(f"no {client}")

    server.on_disconnect = fail
    session, hello = intruder(server)
    session.close()
    wait_until(lambda: not server.is_connected(hello.client))
    assert_serves(*served)
    wait_until(lambda: f"on_disconnect failed for client {hello.client}" in caplog.text)
