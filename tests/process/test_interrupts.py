"""Ctrl-C in a process that has children, without an engine: who sees it, what ends, what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from vllm_tap.cli.interrupts import REPEAT_SECONDS
from vllm_tap.client.interruption import Interruption

START = """
import subprocess, sys, time
from multiprocessing.shared_memory import SharedMemory
from vllm_tap.cli.interrupts import Interrupts

CHILD = "import signal, sys; signal.signal(signal.SIGINT, lambda *_: sys.exit(1)); print(flush=True); sys.stdin.read()"

def spawn():
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    return child
"""

WHILE_STARTING = """
with Interrupts(keeps=True) as interrupts, interrupts.starting():
    left = SharedMemory(create=True, size=1)  # removed later by a process that says so
    child = spawn()
    print(child.pid, flush=True)
    time.sleep(600)
"""

WHILE_RUNNING = """
with Interrupts(keeps=KEEPS) as interrupts:
    with interrupts.starting():
        child = spawn()
    interrupts.at_end.append(lambda: print("the draft is removed", flush=True))
    try:
        print(child.pid, flush=True)
        time.sleep(600)
    except KeyboardInterrupt:
        print("child lives" if child.poll() is None else "child has gone", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def begin() -> Iterator[Callable[[str], Any]]:
    """A function that runs a program in a process group of its own and returns it, when it has a child."""
    started = []

    def call(program: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", START + program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        process.child = psutil.Process(int(process.stdout.readline()))  # type: ignore[attr-defined]
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


def interrupt(process: Any) -> None:
    """Send what a terminal sends to all processes in its foreground."""
    os.killpg(process.pid, signal.SIGINT)


def test_the_first_ends_what_starts(begin: Callable[[str], Any]) -> None:
    """Nothing is to be kept yet: one line, and no process is left."""
    process = begin(WHILE_STARTING)
    interrupt(process)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "vllm-tap: interrupted while the engine started\n"
    process.child.wait(timeout=60)


def test_the_first_ends_all_if_nothing_is_kept(begin: Callable[[str], Any]) -> None:
    """Such as a check, or a capture that is not saved."""
    process = begin("KEEPS = False" + WHILE_RUNNING)
    interrupt(process)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "the draft is removed\n", "vllm-tap: interrupted\n")
    process.child.wait(timeout=60)


def test_the_second_ends_all(begin: Callable[[str], Any]) -> None:
    """The first is raised here and not seen by the child; the second ends both, and removes what is half done."""
    process = begin("KEEPS = True" + WHILE_RUNNING)
    interrupt(process)
    assert process.stdout.readline() == "child lives\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2 * REPEAT_SECONDS)
    interrupt(process)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "the draft is removed\n")
    assert err == "vllm-tap: interrupted twice: ended at once\n"
    process.child.wait(timeout=60)


@pytest.mark.parametrize("program", [WHILE_STARTING, "KEEPS = False" + WHILE_RUNNING, "KEEPS = True" + WHILE_RUNNING])
def test_an_ignored_signal_stays_ignored(begin: Callable[[str], Any], program: str) -> None:
    """As in a shell's background job, whatever the command does just then: it goes on to its end."""
    ignored = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    waited = program.replace("time.sleep(600)", "sys.stdin.readline()")
    process = begin(ignored + waited + 'print("went on", signal.getsignal(signal.SIGINT).name); child.kill()')
    interrupt(process)
    out, err = process.communicate("\n\n", timeout=60)
    assert (process.returncode, out, err) == (0, "went on SIG_IGN\n", "")


def test_an_interrupt_waits_until_nothing_is_half_done() -> None:
    """It is raised at the end of what must not be interrupted, or where it is let in."""
    seen = []

    def interrupted_in_held() -> None:
        with interruption.held():
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("held")

    def interrupted_before_allowed() -> None:
        with interruption.held():
            os.kill(os.getpid(), signal.SIGINT)
            with interruption.allowed():
                seen.append("never")

    def interrupted_in_allowed() -> None:
        with interruption.held(), interruption.allowed():
            os.kill(os.getpid(), signal.SIGINT)
            seen.append("never")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if a shell started this in background
    try:
        with Interruption() as interruption:
            for interrupted in (interrupted_in_held, interrupted_before_allowed, interrupted_in_allowed):
                with pytest.raises(KeyboardInterrupt):
                    interrupted()
            with interruption.held(), interruption.allowed():
                seen.append("quiet")
        assert seen == ["held", "quiet"]
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
