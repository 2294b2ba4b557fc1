"""Rows and calls over a network, on loopback: what arrives, who is let in, and what faults leave."""

from __future__ import annotations

import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from proxy import NEVER, Proxy
from transports import SECRET, NetworkWorker
from vllm_tap.codec.choose import RATES, best
from vllm_tap.errors import DescriptorError, SpecError, TransportError
from vllm_tap.transport.tcp import address, settings
from vllm_tap.transport.tcp.access import ANSWER, PREFACE, ROWS, Access, Credential, connect, read_secret
from vllm_tap.transport.tcp.address import Address, parse
from vllm_tap.transport.tcp.reader import NetworkReader, caller
from vllm_tap.transport.tcp.settings import Settings

MIB = 1 << 20
DEADLINE_S = 20.0
SIZES = [1, 4095, 4096, 100_000, 3 * MIB, 9 * MIB]


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        os.sched_yield()


class Worker(NetworkWorker):
    """A worker of which a call is answered backwards, b"wait" when the gate opens."""

    def __init__(self, tls: bool) -> None:
        self.gate = threading.Event()
        super().__init__(Settings("127.0.0.1", 0, SECRET, False, tls), self._answer)

    def _answer(self, data: bytes) -> bytes:
        if data == b"wait":
            self.gate.wait(DEADLINE_S)
        return data[::-1]

    def reader(self, address: str = "", **terms: object) -> NetworkReader:
        """Connect."""
        return NetworkReader(address or self.server.address, self.access._replace(**terms))

    def close(self) -> None:
        """End all."""
        self.gate.set()
        super().close()


@pytest.fixture(params=[False, True], ids=["clear", "tls"])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    """A worker that listens on loopback."""
    worker = Worker(request.param)
    yield worker
    worker.close()


@pytest.fixture
def proxied(worker: Worker) -> Iterator[Callable[..., Proxy]]:
    """A function that puts a proxy before the worker."""
    made: list[Proxy] = []

    def make(*arguments: object, **options: object) -> Proxy:
        made.append(Proxy(worker.server.address, *arguments, **options))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.mark.parametrize("codec", ["raw", "zstd", "bytesplit", "auto"])
def test_blocks_arrive_unchanged_and_are_free_at_once(worker, codec):
    """Blocks of many sizes, by every codec; the worker has them back as soon as they are here."""
    reader = worker.reader(codec=codec)
    blocks, contents = worker.put(reader, *SIZES)
    held = reader.hold(blocks)
    for index, content in enumerate(contents):
        assert held.lease(index).array.tobytes() == content
    wait_until(lambda: not worker.pools[reader.client].stats().num_blocks)
    reader.close()
    assert held.lease(0).array.tobytes() == contents[0]


def test_a_client_that_is_gone_leaves_nothing(worker):
    """Its blocks are free, its number is refused, and `on_disconnect` hears of it."""
    gone: list[int] = []
    worker.server.on_disconnect = gone.append
    reader = worker.reader()
    worker.put(reader, 100, 100)
    reader.close()
    wait_until(lambda: gone == [reader.client])
    assert not worker.pools[reader.client].stats().num_blocks
    with pytest.raises(TransportError, match="not connected"):
        worker.server.publish(reader.client, [1])


def test_blocks_of_others_are_not_to_be_had(worker):
    """A client that guesses numbers gets nothing, frees nothing, and its own blocks are free after the refusal."""
    mine, theirs = worker.reader(), worker.reader()
    (block, other), contents = worker.put(theirs, 1000, 1000)
    with pytest.raises(DescriptorError, match=f"of block {block.block_id} for this client"):
        mine.hold([block])
    wait_until(lambda: worker.pools[theirs.client].stats().num_blocks == 2)
    assert theirs.lease(block).array.tobytes() == contents[0]
    with pytest.raises(DescriptorError):
        theirs.lease(other._replace(nbytes=1001))


@pytest.mark.parametrize("secret", [b"another secret, as long", b""])
def test_without_the_secret_nothing_is_to_be_had(worker, secret):
    """Neither rows nor calls, and the client is told what may be wrong."""
    terms = worker.access._replace(secret=secret)
    for open_session in (NetworkReader, caller):
        with pytest.raises(TransportError, match="is the secret the one"):
            open_session(worker.server.address, terms)


def test_a_session_that_the_worker_has_ended_is_told_from_a_wrong_secret(worker):
    """Its connections are refused as those of a stranger are, but its secret was right."""
    for credential in (Credential(10**6, b"x" * 32), Credential(worker.reader().client, b"x" * 32)):
        with pytest.raises(TransportError, match=r"session with the worker at .* has gone"):
            connect(parse(worker.server.address), worker.access, ROWS, credential)
    nobody = socket.create_server(("127.0.0.1", 0))
    where = Address(*nobody.getsockname())
    nobody.close()
    with pytest.raises(TransportError, match=r"session with the worker at .* has gone"):
        connect(where, worker.access, ROWS, Credential(1, b"x" * 32))


def test_who_does_not_know_the_secret_is_no_worker():
    """A client takes no rows of something that only listens at the address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        connection, _ = listener.accept()
        connection.recv(PREFACE.size, socket.MSG_WAITALL)
        connection.sendall(ANSWER.pack(b"vtpn", 1, 0, bytes(32)))
        connection.recv(32, socket.MSG_WAITALL)
        connection.sendall(bytes(200))

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(TransportError, match="does not know the secret"):
        NetworkReader(str(Address(*listener.getsockname())), Access(SECRET, tls=False))


def test_rows_in_the_clear_are_refused_by_a_worker_that_speaks_tls():
    """And the other way round, with a sentence on what to change."""
    for tls, says in ((True, "speaks TLS only"), (False, "pass tls=False")):
        worker = Worker(tls)
        with pytest.raises(TransportError, match=says):
            NetworkReader(worker.server.address, Access(SECRET, tls=not tls))
        worker.close()


@pytest.mark.parametrize("nbytes", [0, 1, 5_000_000])
def test_calls_are_answered(worker, nbytes):
    """Requests and replies of any length, again and again."""
    given = caller(worker.server.address, worker.access)
    for seed in range(2):
        data = random.Random(seed).randbytes(nbytes)
        assert given.receive(given.send(data)) == data[::-1]
    given.close()


def test_a_call_may_take_longer_than_silence_is_allowed(worker):
    """The worker says that it lives, so that the client goes on waiting."""
    given = caller(worker.server.address, worker.access._replace(timeout_s=5.0))
    number = given.send(b"wait")
    threading.Timer(6.5, worker.gate.set).start()
    assert given.receive(number) == b"tiaw"
    given.close()


def test_a_link_that_stalls_ends_calls_and_rows(worker, proxied):
    """Nothing hangs: both fail when the worker has been silent for as long as is allowed."""
    proxy = proxied()
    terms = worker.access._replace(timeout_s=1.0)
    given, reader = caller(proxy.address, terms), worker.reader(proxy.address, timeout_s=1.0)
    blocks, contents = worker.put(reader, 1000, 3 * MIB)
    kept = reader.hold(blocks[:1])
    proxy.stall()
    begin = time.monotonic()
    with pytest.raises(TransportError, match="gone"):
        given.receive(given.send(b"abc"))
    with pytest.raises(TransportError, match=r"silent|sent nothing|ended"):
        reader.hold(blocks[1:])
    assert time.monotonic() - begin < DEADLINE_S
    assert kept.lease(0).array.tobytes() == contents[0]
    assert not reader.alive


def test_a_link_that_stalls_for_a_while_goes_on(worker, proxied):
    """Calls and rows that were under way arrive, over the same session."""
    proxy = proxied()
    terms = worker.access._replace(timeout_s=10.0)
    given, reader = caller(proxy.address, terms), worker.reader(proxy.address, timeout_s=10.0)
    blocks, contents = worker.put(reader, *SIZES)
    number = given.send(b"abc")
    proxy.stall(0.5)
    assert given.receive(number) == b"cba"
    proxy.stall(0.5)
    held = reader.hold(blocks)
    assert [held.lease(index).array.tobytes() for index in range(len(blocks))] == contents
    assert reader.alive
    reader.close()


@pytest.mark.parametrize("resets", [True, False], ids=["reset", "end"])
def test_connections_that_break_are_made_anew(worker, proxied, resets):
    """In the middle of rows, by RST or an orderly end: every block arrives once and whole."""
    proxy = proxied(lambda number: 5 * MIB if number else NEVER, resets=resets)
    reader = worker.reader(proxy.address)
    for _ in range(3):
        blocks, contents = worker.put(reader, *SIZES)
        held = reader.hold(blocks)
        assert [held.lease(index).array.tobytes() for index in range(len(blocks))] == contents
    assert proxy.num_broken
    reader.close()


def test_a_session_that_is_reset_ends_at_both_ends(worker, proxied):
    """What is here stays, what is not raises at once, and the worker frees it and hears of the end."""
    gone: list[int] = []
    worker.server.on_disconnect = gone.append
    proxy = proxied()
    given, reader = caller(proxy.address, worker.access), worker.reader(proxy.address)
    blocks, contents = worker.put(reader, 1000, 3 * MIB)
    kept = reader.hold(blocks[:1])
    number = given.send(b"wait")
    proxy.reset()
    with pytest.raises(TransportError, match="gone"):
        given.receive(number)
    wait_until(lambda: not reader.alive and gone == [reader.client])
    with pytest.raises(TransportError, match="gone"):
        reader.hold(blocks[1:])
    assert kept.lease(0).array.tobytes() == contents[0]
    assert not worker.pools[reader.client].stats().num_blocks


def test_rows_come_at_the_rate_of_the_link_and_no_codec_changes_them(worker, proxied, monkeypatch):
    """A slow link to another host: the meter finds its rate, and takes what makes rows smaller."""
    monkeypatch.setattr(address, "host_id", lambda: bytes(16))
    proxy = proxied(bytes_per_second=20e6)
    reader = worker.reader(proxy.address)
    for _ in range(2):
        blocks, contents = worker.put(reader, 4 * MIB)
        assert reader.lease(blocks[0]).array.tobytes() == contents[0]
    assert 1e6 < reader.meter.link_bytes_per_second < 40e6
    assert reader.meter.choose() != "raw"
    reader.close()


def test_bytes_that_mean_nothing_harm_nobody(worker):
    """Connections that say anything, before and after they were let in, end alone."""
    chance, where = random.Random(0), parse(worker.server.address)
    for _ in range(100):
        with socket.create_connection(where) as connection:
            start = chance.choice([b"", b"vtpn", b"\x16\x03\x01", b"vtpn\x01\x00\x03\x00"])
            connection.sendall(start + chance.randbytes(chance.choice([0, 1, 60, 500])))
    reader = worker.reader()
    blocks, contents = worker.put(reader, 5000)
    for frame in (bytes(32), b"\xff" * 32, chance.randbytes(32)):
        stream = reader._lanes.take()
        stream.sendall(frame)
        with pytest.raises((EOFError, OSError)):
            stream.recv_exactly(1)
        reader._lanes.give_back(stream, is_whole=False)
    assert reader.lease(blocks[0]).array.tobytes() == contents[0]


def test_a_worker_listens_where_it_was_told_and_nowhere_without(monkeypatch):
    """Loopback with a port of any number; the second worker of a host has the next port."""
    assert settings.read({}, 0) is None
    found = settings.read({"VLLM_TAP_LISTEN": "0.0.0.0:7300"}, 1)
    assert (found.host, found.port, found.tls, found.is_random) == ("0.0.0.0", 7301, True, True)
    assert not settings.read({"VLLM_TAP_LISTEN": "localhost:0"}, 1).tls
    with pytest.raises(SpecError, match="can be guessed"):
        settings.read({"VLLM_TAP_LISTEN": "[::1]:0", "VLLM_TAP_SECRET": "short"}, 0)
    with pytest.raises(SpecError, match="tcp://host:port"):
        settings.read({"VLLM_TAP_LISTEN": "7300"}, 0)
    monkeypatch.delenv("VLLM_TAP_SECRET", raising=False)
    with pytest.raises(SpecError, match="wants a secret"):
        read_secret(None)
    worker = Worker(False)
    listening = {at.laddr for at in psutil.Process().net_connections("tcp") if at.status == psutil.CONN_LISTEN}
    assert parse(worker.server.address) in {tuple(at) for at in listening}
    assert {at.ip for at in listening} <= {"127.0.0.1", "::1"}
    worker.close()


@pytest.mark.parametrize(("gbit_per_s", "name"), [(1, "bytesplit"), (100, "raw")])
def test_the_codec_follows_the_link(gbit_per_s, name):
    """A link that is slower than the cores takes fewer bytes; a faster one takes them as they are."""
    assert best(gbit_per_s * 1e9 / 8, RATES, 4) == name


def test_rows_of_another_host_arrive_unchanged_while_the_link_is_measured(worker, monkeypatch):
    """The first pieces tell the rate of the link; whatever codec follows, the bytes are the same."""
    monkeypatch.setattr(address, "host_id", lambda: bytes(16))
    reader = worker.reader()
    assert not reader.same_host
    assert reader.meter.is_probing
    for slow in (False, True):
        if slow:  # from here on rows are worth a codec
            monkeypatch.setattr(type(reader.meter), "choose", lambda self: "bytesplit")
        blocks, contents = worker.put(reader, *SIZES)
        held = reader.hold(blocks)
        assert [held.lease(index).array.tobytes() for index in range(len(blocks))] == contents
    assert reader.meter.link_bytes_per_second > 0
    reader.close()
