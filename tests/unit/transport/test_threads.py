"""Threads at the end of the interpreter, in processes of their own: how these end is what is tested."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import vllm_tap
from vllm_tap.transport import threads

SOURCE = Path(vllm_tap.__file__).parent

IN_CPLUSPLUS = """
import threading, torch
from vllm_tap.transport import threads

at_work, stopped = threading.Event(), threading.Event()
matrix = torch.rand(300, 300)

def multiply():
    while not stopped.is_set():
        torch.mm(matrix, matrix)
        at_work.set()

"""

STARTS = {
    "start": "threads.start('worker', multiply, stop=stopped.set)",
    "start_bare": "threads.start_bare(multiply, stop=stopped.set)",
}


def run(program: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run a program of its own; return how it ended."""
    command = [sys.executable, "-c", program]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SOURCE.parent)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_a_thread_in_cplusplus_does_not_abort_the_process(start):
    """It has ended when the interpreter does, also one that the script does not wait for."""
    done = run(f"{IN_CPLUSPLUS}{start}\nat_work.wait()")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="a daemon thread is no longer ended where it stands")
def test_a_daemon_thread_in_cplusplus_aborts_the_process():
    """What the others are for: with a thread of Python's own it happens each time."""
    done = run(f"{IN_CPLUSPLUS}threading.Thread(target=multiply, daemon=True).start()\nat_work.wait()")
    assert done.returncode == -6
    assert "terminate called without an active exception" in done.stderr


def test_threads_that_are_no_daemons_end_first():
    """They may be at work with what would be ended; then comes the order of `stop`, once for each that runs."""
    program = """
import threading
from vllm_tap.transport import threads

stopped = threading.Event()
threads.start("served", stopped.wait, stop=lambda: (print("stop", flush=True), stopped.set()))
threads.start("over", lambda: None, stop=lambda: print("not this", flush=True)).join()
threading.Thread(target=lambda: (stopped.wait(0.2), print("done", stopped.is_set(), flush=True))).start()
"""
    assert run(program).stdout == "done False\nstop\n"


def test_no_thread_starts_when_the_end_has_begun():
    """Its start raises what Python raises when there are no more threads."""
    program = """
import atexit
from vllm_tap.transport import threads

def late():
    print(threads.is_ending())
    for start in (lambda: threads.start("late", print, stop=print), lambda: threads.start_bare(print, stop=print)):
        try:
            start()
        except RuntimeError as error:
            print(error)

atexit.register(late)
threads.start("first", print, "ran", stop=print).join()
"""
    sentence = "the interpreter is about to end: no more threads are started"
    assert run(program).stdout.splitlines() == ["ran", "True", sentence, sentence]


def test_a_thread_that_does_not_end_is_waited_for_so_long_and_named_in_the_log():
    """The process ends all the same."""
    program = """
import threading
from vllm_tap.transport import threads

threads.PATIENCE_SECONDS = 0.1
threads.start("stuck", threading.Event().wait, stop=lambda: 1 / 0)
"""
    done = run(program)
    assert (done.returncode, done.stderr.strip()) == (0, "vllm-tap: not ended within 0.1 s: stuck")


def test_a_forked_process_leaves_threads_of_its_parent_alone():
    """It neither tells them to end nor waits for them."""
    program = """
import os, sys, threading
from vllm_tap.transport import threads

stopped = threading.Event()
threads.start("served", stopped.wait, stop=lambda: (print("stop", os.getpid() == parent, flush=True), stopped.set()))
threads.start_bare(stopped.wait, stop=lambda: None)
parent, child = os.getpid(), os.fork()
if child:
    print("child", os.waitpid(child, 0)[1], flush=True)
"""
    assert run(program).stdout == "child 0\nstop True\n"


def test_a_start_that_fails_leaves_nothing_to_wait_for(monkeypatch):
    """As where the system has no more threads."""

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    before = dict(threads._running)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(threads._thread, "start_new_thread", refuse)
    for start in (lambda: threads.start("none", print, stop=print), lambda: threads.start_bare(print, stop=print)):
        with pytest.raises(RuntimeError, match="can't start"):
            start()
    assert threads._running == before


def test_all_threads_of_a_worker_and_its_client_end():
    """In time, whatever each waits for: a socket, a while, or a worker that does not read."""
    program = """
import atexit, os, sys, threading, time

names = lambda: sorted(thread.name for thread in threading.enumerate())
began = []
atexit.register(lambda: print(names(), list(threads._running), time.monotonic() - began[0] < 5, flush=True))

from vllm_tap.engine.capture.idle import PoolKeeper
from vllm_tap.transport import threads
from vllm_tap.transport.calls import Caller, CallServer
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer

pool = SegmentPool(32 << 20, segment_bytes=2 << 20)
server, calls = SegmentServer(lambda _: pool), CallServer(lambda request: request)
reader, caller = SegmentReader(server.address), Caller(calls.address)
assert caller.receive(caller.send(b"call")) == b"call"
block = pool.reserve(1 << 20)
server.publish(reader.client, [block.block_id])
lease = reader.lease(block)
keeper = PoolKeeper([pool], lambda: False)
keeper.linger()

link = reader._link
link._send_ended = lambda: False  # as if the worker read nothing: the socket takes no more
class Full:
    def fileno(self): return full[0].fileno()
import socket
full = socket.socketpair()
full[0].setblocking(False)
try:
    while True: full[0].send(bytes(65536))
except BlockingIOError: pass
link._socket = Full()
link.end([block.block_id])

print(names(), len(threads._running), flush=True)
began.append(time.monotonic())
"""
    done = run(program)
    at_work = ["vllm-tap-calls", "vllm-tap-calls-client", "vllm-tap-keeper", "vllm-tap-reader", "vllm-tap-segments"]
    assert done.stdout.splitlines() == [f"{['MainThread', *at_work]} 6", "['MainThread'] [] True"], done.stderr
    assert (done.returncode, done.stderr) == (0, "")


def test_all_threads_of_the_package_are_started_here():
    """None that is ended where it stands."""
    pattern = re.compile(r"threading\.Thread\(|\bstart_new_thread\(|threading\.Timer\(")
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if pattern.search(path.read_text())}
    assert found == {"transport/threads.py"}
