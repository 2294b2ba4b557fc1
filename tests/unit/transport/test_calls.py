"""Calls over a socket: who gets which reply, and what interruptions, deaths and bad clients leave.

Run as a program, this file is another process: `test_calls.py worker`, or `test_calls.py fork ADDRESS`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vllm_tap
from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.frame.messages import MAX_MESSAGE_BYTES
from vllm_tap.transport import calls, wire
from vllm_tap.transport.calls import Caller, CallServer

DEADLINE_S = 30.0
LONG = 5_000_000
"""Bytes of a request or reply that no socket holds at once."""

BAD_FRAMES = [
    pytest.param(struct.pack("<QQ", 2, 0), "answered call 2, expected 1", id="another number"),
    pytest.param(struct.pack("<QQ", 1, 2**64 - 1), "exceeds the limit", id="too long"),
]


def content(seed: int, nbytes: int) -> bytes:
    """Return bytes that differ by seed."""
    return random.Random(seed).randbytes(nbytes)


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return as soon as a condition holds; fail where it never does."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {DEADLINE_S} s"
        os.sched_yield()


class Gate:
    """A handler that echoes, except that it stops at b"wait" until it is opened."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, data: bytes) -> bytes:
        self.seen.append(data)
        if data == b"wait":
            self.reached.set()
            assert self.opened.wait(DEADLINE_S)
        return data


@pytest.fixture
def gate() -> Iterator[Gate]:
    """The handler of `server`."""
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def server(gate: Gate) -> Iterator[CallServer]:
    """A server in this process."""
    server = CallServer(gate)
    yield server
    server.close()


@pytest.fixture
def caller(server: CallServer) -> Iterator[Caller]:
    """A client of `server`."""
    caller = Caller(server.address)
    yield caller
    caller.close()


class Thread(threading.Thread):
    """A thread that hands its result or exception to whoever joins it."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        super().__init__(daemon=True)
        self._function, self._arguments = function, args
        self.start()

    def run(self) -> None:
        self.error: BaseException | None = None
        try:
            self.result = self._function(*self._arguments)
        except BaseException as error:
            self.error = error

    def outcome(self) -> object:
        """Return what the function returned, or raise what it raised."""
        self.join(DEADLINE_S)
        assert not self.is_alive(), "the thread hangs"
        if self.error is not None:
            raise self.error
        return self.result


def call(caller: Caller, data: bytes) -> bytes:
    """Send and receive."""
    return caller.receive(caller.send(data))


def raw_client(address: str) -> socket.socket:
    """Return a connection of a client that says what it likes."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(DEADLINE_S)
    connection.connect(f"\0{address}")
    return connection


def has_ended(connection: socket.socket) -> bool:
    """Wait for the other side to close; tell that it did, without a byte before."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:  # it closed with bytes unread
        return True


@contextlib.contextmanager
def raw_worker() -> Iterator[tuple[Caller, socket.socket]]:
    """A caller, and the other end of its connection."""
    address = f"vllm-tap-test-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(f"\0{address}")
        listener.listen()
        caller = Caller(address)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(DEADLINE_S)
            yield caller, connection
        caller.close()


def start_process(*role: str) -> subprocess.Popen[str]:
    """Run this file as another process."""
    package_dir = str(Path(next(iter(vllm_tap.__path__))).parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([package_dir, os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        [sys.executable, __file__, *role], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.fixture
def worker() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A worker process and its address."""
    with start_process("worker") as process:
        yield process, process.stdout.readline().strip()
        process.kill()


# ------------------------------------------------------------------------------------------------- calls and replies


@pytest.mark.parametrize("nbytes", [0, 1, 4096, LONG])
def test_a_reply_has_the_bytes_that_the_handler_returned(caller, nbytes):
    """Requests and replies of any length arrive unchanged, again and again on one connection."""
    for seed in range(3):
        data = content(seed, nbytes)
        assert call(caller, data) == data
    assert caller.alive


@pytest.mark.parametrize("nbytes", [0, LONG])
def test_a_worker_process_answers(worker, nbytes):
    """Across two processes the bytes are the same."""
    caller = Caller(worker[1])
    assert call(caller, content(1, nbytes)) == content(1, nbytes)[::-1]
    caller.close()


def test_frames_are_a_number_a_length_and_the_bytes(server):
    """The format is what the module says, also if it arrives byte by byte."""
    with raw_client(server.address) as connection:
        for number in (7, 2**64 - 1):
            frame = struct.pack("<QQ", number, 5) + b"bytes"
            for byte in frame:
                connection.send(bytes([byte]))
            assert connection.recv(len(frame), socket.MSG_WAITALL) == frame


def test_a_default_timeout_of_the_process_is_not_ours(caplog):
    """Calls and idle connections wait as long as they take, whatever a program has set for its other sockets."""
    socket.setdefaulttimeout(1e-6)
    try:
        server = CallServer(bytes)
        caller = Caller(server.address)
        for seed in range(3):
            assert call(caller, content(seed, LONG)) == content(seed, LONG)
    finally:
        socket.setdefaulttimeout(None)
    assert not caplog.records
    caller.close()
    server.close()


def test_threads_get_their_own_replies(caller):
    """Threads that share a caller never see each other's replies."""

    def many(thread: int) -> None:
        for turn in range(50):
            data = content(1000 * thread + turn, 20_000 * (turn % 3))
            assert call(caller, data) == data

    for thread in [Thread(many, number) for number in range(8)]:
        thread.outcome()


def test_a_call_that_waits_holds_up_nobody(server, gate, caller):
    """Other threads and other callers are served while the worker is busy with a call."""
    waiting = Thread(call, caller, b"wait")
    assert gate.reached.wait(DEADLINE_S)
    assert call(caller, b"another thread") == b"another thread"
    other = Caller(server.address)
    assert call(other, b"another caller") == b"another caller"
    gate.opened.set()
    assert waiting.outcome() == b"wait"
    other.close()


def test_a_reply_belongs_to_the_thread_that_sent(caller):
    """Another thread is told so, and the reply stays for its owner."""
    number = caller.send(b"mine")
    with pytest.raises(TransportError, match=f"call {number} is not under way in this thread"):
        Thread(caller.receive, number).outcome()
    assert caller.receive(number) == b"mine"
    with pytest.raises(TransportError, match="receive once"):
        caller.receive(number)


# ------------------------------------------------------------------------------------------------------ interruptions


class Interruption(BaseException):
    """What a handler of a signal raises."""


def test_the_reply_of_a_call_that_nobody_received_is_skipped(caller, gate):
    """Its call is handled, its reply is not taken for that of the next one."""
    first = caller.send(b"first")
    second = caller.send(b"second")
    assert caller.receive(second) == b"second"
    with pytest.raises(TransportError, match=f"call {first} is not under way"):
        caller.receive(first)
    assert gate.seen == [b"first", b"second"]
    assert call(caller, b"third") == b"third"


def test_a_long_reply_that_nobody_received_does_not_block_the_next_request(caller):
    """Neither side waits for the other to read when both have more to say than a socket holds."""
    caller.send(content(1, LONG))
    assert call(caller, content(2, LONG)) == content(2, LONG)


@pytest.mark.parametrize("arrived", [0, 7, 16, 18])
def test_a_call_that_was_interrupted_while_it_read_can_be_gone_on_with(monkeypatch, arrived):
    """What had arrived of the frame is kept, whether the caller asks again or calls anew."""
    for again in (True, False):
        with raw_worker() as (caller, connection), monkeypatch.context() as patch:
            number = caller.send(b"abc")
            frame = struct.pack("<QQ", number, 3) + b"ABC"
            connection.sendall(frame[:arrived])
            interrupt_once(patch, "recv", after_bytes=arrived)
            with pytest.raises(Interruption):
                caller.receive(number)
            connection.sendall(frame[arrived:])
            if again:
                assert caller.receive(number) == b"ABC"
                continue
            number = caller.send(b"next")
            connection.sendall(struct.pack("<QQ", number, 1) + b"N")
            assert caller.receive(number) == b"N"


@pytest.mark.parametrize("gone", [1, 10, 17])
def test_a_request_that_was_interrupted_half_way_is_completed(monkeypatch, gone):
    """The worker reads whole frames, and the next call gets its own reply."""
    with raw_worker() as (caller, connection):
        with monkeypatch.context() as patch:
            interrupt_once(patch, "send", after_bytes=gone)
            with pytest.raises(Interruption):
                caller.send(b"abc")
        connection.sendall(struct.pack("<QQ", 1, 3) + b"ABC")
        number = caller.send(b"next")
        connection.sendall(struct.pack("<QQ", number, 1) + b"N")
        assert caller.receive(number) == b"N"
        expected = struct.pack("<QQ", 1, 3) + b"abc" + struct.pack("<QQ", number, 4) + b"next"
        assert connection.recv(len(expected), socket.MSG_WAITALL) == expected


def test_a_request_of_which_nothing_was_sent_is_forgotten(caller, gate, monkeypatch):
    """A call that was interrupted before its first byte is not made later."""
    with monkeypatch.context() as patch:
        interrupt_once(patch, "send", after_bytes=0)
        with pytest.raises(Interruption):
            caller.send(b"forgotten")
    assert call(caller, b"next") == b"next"
    assert gate.seen == [b"next"]


def interrupt_once(patch: pytest.MonkeyPatch, method: str, after_bytes: int) -> None:
    """Let this thread's sockets carry so many bytes; then raise, once."""
    real, thread, left = getattr(socket.socket, method), threading.get_ident(), [after_bytes]

    def carry(self: socket.socket, data: bytes | int, flags: int = 0) -> bytes | int:
        if threading.get_ident() != thread or not left:
            return real(self, data, flags)
        if not left[0]:
            left.clear()
            raise Interruption
        part = min(left[0], data) if isinstance(data, int) else data[: left[0]]
        done = real(self, part, flags)
        left[0] -= done if isinstance(done, int) else len(done)
        return done

    patch.setattr(socket.socket, method, carry, raising=False)


def test_signals_at_any_moment_leave_the_caller_usable(caller):
    """Handlers that raise wherever a call happens to be: every call that returns has its own reply, to the end."""
    armed, done, interrupted = [], [], 0  # no Event: the handler may run inside any of its methods

    def raise_if_armed(*_: object) -> None:
        if armed:
            armed.clear()
            raise Interruption

    def shoot() -> None:
        while not done:
            if armed:
                signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            os.sched_yield()

    before = signal.signal(signal.SIGUSR1, raise_if_armed)
    shooter = Thread(shoot)
    try:
        for turn in range(2000):
            data = content(turn, random.Random(turn).choice([0, 10, 3000, 300_000]))
            try:
                armed.append(turn)
                reply = call(caller, data)
                armed.clear()
            except Interruption:
                interrupted += 1
                continue
            assert reply == data
    finally:
        done.append(True)
        shooter.outcome()
        signal.signal(signal.SIGUSR1, before)
    assert interrupted
    assert call(caller, b"last") == b"last"


def test_a_signal_interrupts_a_call_that_waits(caller, gate):
    """Ctrl-C does not have to wait for the worker."""

    def press() -> None:
        assert gate.reached.wait(DEADLINE_S)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    # Shells have what they start in the background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pressing = Thread(press)
        with pytest.raises(KeyboardInterrupt):
            call(caller, b"wait")
        pressing.outcome()
    finally:
        signal.signal(signal.SIGINT, before)
    gate.opened.set()
    assert call(caller, b"next") == b"next"


# --------------------------------------------------------------------------------------------------- ends of all kinds


def test_nothing_at_the_address():
    """The error names the socket and asks the question that usually helps."""
    address = f"vllm-tap-test-{secrets.token_hex(8)}"
    with pytest.raises(TransportError, match=f"no worker answers at the socket '{address}'.*same container") as caught:
        Caller(address)
    assert caught.value.path == address


@pytest.mark.parametrize("request_bytes", [4, LONG])
def test_a_worker_that_is_killed_ends_the_call(worker, request_bytes):
    """Who waits for a reply learns that the worker has gone; so does every later call, from any thread."""
    process, address = worker
    caller = Caller(address)
    number = caller.send(b"hang" + content(1, request_bytes - 4))
    assert process.stdout.readline() == "hanging\n"
    assert caller.alive
    process.kill()
    with pytest.raises(TransportError, match=r"the worker has gone .*: start the engine again"):
        caller.receive(number)
    assert not caller.alive
    with pytest.raises(TransportError, match="the worker has gone"):
        caller.send(b"")
    process.wait(DEADLINE_S)  # while it dies it may still listen
    with pytest.raises(TransportError, match="no worker answers"):
        Thread(caller.send, b"").outcome()
    caller.close()


def test_a_reply_that_came_before_the_end_is_read():
    """The worker's last words count; that it has gone shows at once."""
    with raw_worker() as (caller, connection):
        number = caller.send(b"")
        connection.recv(16, socket.MSG_WAITALL)
        connection.sendall(struct.pack("<QQ", number, 4) + b"last")
        connection.close()
        assert not caller.alive
        assert caller.receive(number) == b"last"
        with pytest.raises(TransportError, match="the worker has gone"):
            caller.send(b"")


@pytest.mark.parametrize(("frame", "message"), BAD_FRAMES)
def test_a_worker_that_talks_nonsense_is_given_up(frame, message):
    """A frame that cannot be is refused before memory is taken for it, and nothing is read behind it."""
    with raw_worker() as (caller, connection):
        number = caller.send(b"")
        connection.sendall(frame + bytes(100))
        with pytest.raises(DescriptorError, match=message):
            caller.receive(number)
        assert not caller.alive
        with pytest.raises(TransportError):
            caller.send(b"")


def test_closing_a_server_ends_its_calls(server, gate, caller):
    """A client that waits learns it, nothing answers at the address, and closing again is nothing."""
    idle = Caller(server.address)
    waiting = Thread(call, caller, b"wait")
    assert gate.reached.wait(DEADLINE_S)
    for thread in [Thread(server.close) for _ in range(4)]:
        thread.outcome()
    with pytest.raises(TransportError, match="the worker has gone"):
        waiting.outcome()
    assert not idle.alive
    with pytest.raises(TransportError, match="no worker answers"):
        Caller(server.address)
    idle.close()


def test_a_handler_may_close_its_server():
    """Closing waits for no thread, not even for the one that closes."""
    closed = threading.Event()

    def handle(data: bytes) -> bytes:
        server.close()  # type: ignore[attr-defined]
        closed.set()
        return data

    server = CallServer(handle)
    caller = Caller(server.address)
    with pytest.raises(TransportError, match="the worker has gone"):
        call(caller, b"")
    assert closed.wait(DEADLINE_S)
    caller.close()


def test_closing_a_caller_ends_its_calls(caller, gate):
    """A thread that waits is told, and so is who calls later; closing again is nothing."""
    waiting = Thread(call, caller, b"wait")
    assert gate.reached.wait(DEADLINE_S)
    caller.close()
    caller.close()
    # The call has reached the server; whether its thread waits for the reply yet is another matter.
    with pytest.raises(TransportError, match=r"closed during a call|is closed: connect again"):
        waiting.outcome()
    assert not caller.alive
    for late in (lambda: caller.send(b""), lambda: caller.receive(1), lambda: Thread(caller.send, b"").outcome()):
        with pytest.raises(TransportError, match="is closed: connect again"):
            late()


def test_no_descriptor_and_no_thread_is_left():
    """Connections end with their thread, with their caller and with the server."""

    def held() -> tuple[int, int]:
        names = [thread.name for thread in threading.enumerate()]
        return len(os.listdir("/proc/self/fd")), sum(name.startswith("vllm-tap-calls") for name in names)

    gc.collect()
    wait_until(lambda: held()[1] == 0, "the end of servers of other tests")
    before = held()[0]
    server = CallServer(bytes)
    caller = Caller(server.address)
    for _ in range(5):
        Thread(call, caller, b"").outcome()
    # The listener, two ends of a connection; the thread that accepts and the one that serves.
    wait_until(lambda: held() == (before + 3, 2), "the end of the connections of threads that have ended")
    caller.close()
    wait_until(lambda: held() == (before + 1, 1), "the end of the connection of a caller that was closed")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ResourceWarning)
        dropped = Caller(server.address)
        wait_until(lambda: held() == (before + 3, 2), "a connection")
        del dropped
        wait_until(lambda: held() == (before + 1, 1), "the end of the connection of a caller that nobody closed")
    assert not warned
    server.close()
    wait_until(lambda: held() == (before, 0), "the end of the server")


def test_a_forked_child_leaves_the_connection_to_its_parent(worker):
    """It is told to connect again, and closing there ends nothing here."""
    with start_process("fork", worker[1]) as process:
        lines = process.communicate(timeout=DEADLINE_S)[0].splitlines()
    assert lines[0].startswith("this connection belongs to process ")
    assert lines[0].endswith("connect again here.")
    assert lines[1:] == ["child alive: False", "child's own: b'tac'", "parent: b'god' True"]


def test_threads_that_wait_keep_no_process_from_ending(worker):
    """A worker ends with its main thread, while clients are connected and a call hangs."""
    process, address = worker
    caller = Caller(address)
    number = caller.send(b"hang")
    assert process.stdout.readline() == "hanging\n"
    process.stdin.close()
    assert process.wait(DEADLINE_S) == 0
    with pytest.raises(TransportError, match="the worker has gone"):
        caller.receive(number)
    caller.close()


# ---------------------------------------------------------------------------------------------------------- bad clients


def test_clients_that_stop_half_way_disturb_nobody(server, caller):
    """One sends nothing, one half a header, one half a request, one never reads; the others are served."""
    with contextlib.ExitStack() as stack:
        silent, half_header, half_request, deaf = (stack.enter_context(raw_client(server.address)) for _ in range(4))
        half_header.sendall(bytes(9))
        half_request.sendall(struct.pack("<QQ", 1, MAX_MESSAGE_BYTES) + bytes(1000))
        deaf.sendall(struct.pack("<QQ", 1, LONG) + bytes(LONG))
        for seed in range(5):
            assert call(caller, content(seed, 1000)) == content(seed, 1000)
        silent.sendall(struct.pack("<QQ", 1, 0))
        assert silent.recv(16, socket.MSG_WAITALL) == struct.pack("<QQ", 1, 0)
    assert call(caller, b"after they left") == b"after they left"


def test_a_request_above_the_limit_is_refused(server, caller, caplog):
    """The connection ends before the bytes are read; the log says why."""
    with caplog.at_level(logging.WARNING), raw_client(server.address) as connection:
        connection.sendall(struct.pack("<QQ", 1, MAX_MESSAGE_BYTES + 1) + bytes(100))
        assert has_ended(connection)
        assert f"{MAX_MESSAGE_BYTES + 1} bytes exceeds the limit" in caplog.text
    assert call(caller, b"") == b""


def test_the_limit_is_the_longest_request(caller, gate, monkeypatch):
    """A caller sends no longer one, and says how long it may be; the connection goes on."""
    monkeypatch.setattr(calls, "MAX_MESSAGE_BYTES", 1000)
    with pytest.raises(TransportError, match="1001 bytes exceeds the limit of 1000: send it in pieces"):
        caller.send(bytes(1001))
    assert call(caller, bytes(1000)) == bytes(1000)
    assert len(gate.seen) == 1


def test_a_handler_that_raises_ends_its_connection_alone(caplog):
    """The failure is logged with its traceback; other connections go on."""

    def handle(data: bytes) -> bytes:
        if data == b"fail":
            raise OSError("not an end of the connection")
        return data

    server = CallServer(handle)
    failing, other = Caller(server.address), Caller(server.address)
    with pytest.raises(TransportError, match="the worker has gone"):
        call(failing, b"fail")
    assert not failing.alive
    assert "a call failed without a reply" in caplog.text
    assert "OSError: not an end of the connection" in caplog.text
    assert call(other, b"fine") == b"fine"
    assert other.alive
    for each in (failing, other, server):
        each.close()


def test_other_users_are_refused(server, caller, caplog, monkeypatch):
    """Neither side talks to a process of another user; root may."""
    me = os.geteuid()
    call(caller, b"")  # from here on it is admitted
    with monkeypatch.context() as patch:
        patch.setattr(wire, "peer_uid", lambda _: me + 1)
        with raw_client(server.address) as connection:
            assert has_ended(connection)
        assert f"refused calls of user {me + 1}" in caplog.text
        with pytest.raises(TransportError, match=f"belongs to user {me + 1}, expected"):
            Caller(server.address)
        patch.setattr(wire, "peer_uid", lambda _: 0)
        root = Caller(server.address)
        assert call(root, b"root") == b"root"
        root.close()
    assert call(caller, b"still here") == b"still here"


def test_a_worker_without_descriptors_accepts_again_later(server, caller, caplog, monkeypatch):
    """A failed accept is logged and tried again; those who are connected are served meanwhile."""
    real, failures = socket.socket.accept, [OSError(24, "Too many open files")]

    def accept(self: socket.socket) -> tuple[socket.socket, object]:
        if failures:
            raise failures.pop()
        return real(self)

    monkeypatch.setattr(calls, "_RETRY_S", 0.01)
    monkeypatch.setattr(socket.socket, "accept", accept)
    for number in range(2):  # the first is still taken by the call that is under way
        late = Caller(server.address)
        assert call(late, bytes([number])) == bytes([number])
        late.close()
    assert "Too many open files" in caplog.text
    assert call(caller, b"") == b""


# -------------------------------------------------------------------------------------------------------- settled calls


def test_what_was_sent_before_is_handled_once_the_server_has_settled(server, gate):
    """Also a call on a connection that the server has not accepted yet, whenever its threads get to run."""
    for number in range(200):
        caller = Caller(server.address)
        caller.send(bytes([number]))
        assert server.settle(DEADLINE_S)
        assert gate.seen[-1] == bytes([number])
        caller.close()


def test_a_settling_server_waits_for_a_call_that_is_handled(server, caller, gate):
    """It says so when its patience ends, and goes on when the call has ended."""
    caller.send(b"wait")
    assert gate.reached.wait(DEADLINE_S)
    assert not server.settle(0.01)
    thread = Thread(server.settle, DEADLINE_S)
    gate.opened.set()
    assert thread.outcome() is True


def test_a_client_that_sends_half_a_call_does_not_hold_a_settling_server(server, caller):
    """Not longer than its patience, and not at all once the client has gone."""
    with raw_client(server.address) as connection:
        connection.sendall(struct.pack("<QQ", 1, 100) + bytes(50))
        assert not server.settle(0.01)
    assert server.settle(DEADLINE_S)
    assert call(caller, b"") == b""


def test_a_server_without_calls_has_settled(server, caller):
    """With connections or without, and when it has been closed."""
    assert call(caller, b"done") == b"done"
    assert server.settle(DEADLINE_S)
    server.close()
    wait_until(lambda: not caller.alive, "the end of the connection")
    assert server.settle(DEADLINE_S)


# --------------------------------------------------------------------------------------------------- the other process


def run_worker() -> None:
    """Reverse requests until the standard input ends; hang at those that say so."""

    def handle(data: bytes) -> bytes:
        if data.startswith(b"hang"):
            print("hanging", flush=True)
            threading.Event().wait()
        return data[::-1]

    server = CallServer(handle)
    print(server.address, flush=True)
    sys.stdin.read()


def run_fork(address: str) -> None:
    """Use a caller on both sides of a fork."""
    caller = Caller(address)
    child = os.fork()
    if child == 0:
        try:
            caller.send(b"cat")
        except TransportError as error:
            print(error)
        print("child alive:", caller.alive)
        caller.close()
        print("child's own:", call(Caller(address), b"cat"), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
    print("parent:", call(caller, b"dog"), caller.alive)


if __name__ == "__main__":
    {"worker": run_worker, "fork": run_fork}[sys.argv[1]](*sys.argv[2:])
