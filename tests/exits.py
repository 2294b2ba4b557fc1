#!/usr/bin/env python3
"""Ends of processes whose engines are at work, and how they end: python tests/exits.py --times 50.

Each process starts an engine, captures, and ends in one of several ways. The last lines say how many ended and how.
The exit status is 1 if one ended by a signal, with another status than it should, not at all, or with a fault in its
log, be it that of its engine's process.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import functools
import itertools
import json
import multiprocessing
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "support"))

FAULTS = ("terminate called", "Fatal Python error", "Aborted", "Segmentation fault", "vllm-tap: ")
"""What the log of an end that is not as it should be has; a C++ fault in the engine's process shows only there."""

DEADLINE_S = 600.0

SIZE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 16}


class Exit(NamedTuple):
    """A way to end.

    Attributes:
        kind: "generate" or "pool".
        process: "own" if the engine has a process of its own, else "same".
        way: A function of this module that begins with `end_`.
    """

    kind: str
    process: str
    way: str

    def __str__(self) -> str:
        """Return a name."""
        return "-".join(self)


WAYS = ("held", "dropped", "under_way", "interrupted")

EXITS = [
    Exit(*parts)
    for parts in itertools.chain.from_iterable(
        zip(*(itertools.product((kind,), ("own", "same"), WAYS) for kind in ("pool", "generate")), strict=True)
    )
]
"""All ways, the kinds in turn."""


# ------------------------------------------------------------------------------------------- the process that ends


def start(folder: str, kind: str) -> Any:
    """Return an engine."""
    from vllm import LLM

    return LLM(folder, **SIZE, **({"runner": "pooling", "convert": "embed"} if kind == "pool" else {}))


def prompts(count: int) -> list[dict[str, list[int]]]:
    """Return prompts of several lengths."""
    return [
        {"prompt_token_ids": [(7 * number + at) % 250 for at in range(1 + 37 * number % 200)]}
        for number in range(count)
    ]


def captured(llm: Any, kind: str, count: int = 64) -> Any:
    """Capture all layers from prompts that fill several steps."""
    import vllm_tap

    sampling = {} if kind == "pool" else {"max_tokens": 24, "ignore_eos": True}
    return vllm_tap.capture(llm, prompts(count), vllm_tap.Spec(hidden_states="all"), progress=False, **sampling)


def end_held(llm: Any, kind: str) -> Any:
    """End with the engine and rows in a module's hands, as scripts and notebooks do."""
    result = captured(llm, kind)
    return llm, result, [sample.hidden_states[1] for sample in result]


def end_dropped(llm: Any, kind: str) -> Any:
    """End with rows whose engine has just been let go of."""
    return captured(llm, kind)


def end_under_way(llm: Any, kind: str) -> Any:
    """End with a capture under way, and requests of it in the engine."""
    import vllm

    import vllm_tap

    recording = vllm_tap.Recording(llm, vllm_tap.Spec(hidden_states="all"))
    params = (
        vllm.PoolingParams(task="embed") if kind == "pool" else vllm.SamplingParams(max_tokens=100, ignore_eos=True)
    )
    for number, prompt in enumerate(prompts(64)):
        llm.llm_engine.add_request(str(number), prompt, recording.mark(params, number))
    for _ in range(2):
        llm.llm_engine.step()
    return llm, recording


def end_interrupted(llm: Any, kind: str) -> Any:
    """End in the midst of a call, by an exception that nobody catches."""
    captured(llm, kind, 2)  # so that the next one is at work at once
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    held = [captured(llm, kind, 256) for _ in range(50)]
    return llm, held


def run_and_end(name: str, folder: str) -> Any:
    """Do what an end begins with; what is returned is to be kept until it."""
    kind, _, way = name.split("-")
    return globals()[f"end_{way}"](start(folder, kind), kind)


# ------------------------------------------------------------------------------------------ the process that watches


class End(NamedTuple):
    """How a process ended: its status, None if it did not, and its log."""

    how: Exit
    status: int | None
    log: str
    seconds: float

    @property
    def fault(self) -> str:
        """The reason why this is not as it should be, or an empty string."""
        if self.status != 0:
            return f"status {self.status}"
        return next((f"log: {line.strip()}" for line in self.log.splitlines() if any(f in line for f in FAULTS)), "")


DEFAULTS = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}


def environment_of(how: Exit | None = None) -> dict[str, str]:
    """Return the environment of a process that ends in some way."""
    fixed = {"PYTHONFAULTHANDLER": "1", "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1"}
    process = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(how.process == "own"))} if how else {}
    return DEFAULTS | os.environ | fixed | process


def run(how: Exit, folder: Path) -> End:
    """Start a process that ends in some way, and wait for it."""
    command = [sys.executable, __file__, "--end", str(how), "--model", str(folder)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment_of(how), stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        status = ended(process.pid)
        log.seek(0)
        return End(how, status, log.read(), time.monotonic() - began)


def ended(pid: int) -> int | None:
    """Wait for a child; return its status, a negative signal, or None if it had to be killed."""
    process = os.pidfd_open(pid)
    in_time = bool(select.select([process], [], [], DEADLINE_S)[0])
    os.close(process)
    if not in_time:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if in_time else None


class Forks:
    """A process that has imported all and has no thread; forks of it need not import again."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--serve"]
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            command, env=environment_of() | alone, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, how: Exit, folder: Path) -> End:
        """Fork a process that ends in some way, and wait for it."""
        began = time.monotonic()
        with tempfile.NamedTemporaryFile("r") as log:
            self._process.stdin.write(json.dumps([str(how), str(folder), log.name, environment_of(how)]) + "\n")
            self._process.stdin.flush()
            status = json.loads(self._process.stdout.readline())
            return End(how, status, log.read(), time.monotonic() - began)

    def close(self) -> None:
        """End it."""
        self._process.stdin.close()
        self._process.wait()


def same(given: Any, *_: Any) -> Any:
    """Return the first argument."""
    return given


def serve_forks() -> Any:
    """Fork a process for each line of the input; in such a process return what it is to keep until its end."""
    import torch  # noqa: F401
    import transformers  # noqa: F401
    import vllm

    import vllm_tap

    _ = vllm.LLM, vllm_tap.capture, vllm_tap.Recording  # names that are loaded when they are first used
    assert len(os.listdir("/proc/self/task")) == 1, "a thread is not there after a fork"
    for line in sys.stdin:
        name, folder, log, environment = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ.update(environment)
            for target, path in enumerate((os.devnull, log, log)):
                os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), target)
            faulthandler.enable()
            # For the engine as well, which would import all once more.
            multiprocessing.get_context = functools.partial(same, multiprocessing.get_context("fork"))
            return run_and_end(name, folder)
        print(json.dumps(ended(pid)), flush=True)
    return None


def run_all(exits: list[Exit], folder: Path, jobs: int, forks: bool) -> Iterator[End]:
    """Run some at a time; yield them in order."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(jobs) as threads:
        free = queue.SimpleQueue[Callable[[Exit, Path], End]]()
        for _ in range(jobs):
            free.put(stack.enter_context(contextlib.closing(Forks())).run if forks else run)

        def run_one(how: Exit) -> End:
            runner = free.get()
            try:
                return runner(how, folder)
            finally:
                free.put(runner)

        yield from threads.map(run_one, exits)


def main() -> int:
    """Run what was asked for and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="processes in all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--forks", action="store_true", help="forks of a process that has imported all, much faster")
    parser.add_argument("--only", default="", help="names of ends that contain this alone, such as pool-own")
    parser.add_argument("--model", type=Path, help="folder of a tiny Llama; one is made unless given")
    options = parser.parse_args()
    chosen = [how for how in EXITS if options.only in str(how)]
    if not chosen:
        parser.error(f"no end is called {options.only!r}: there are {', '.join(map(str, EXITS))}")
    with tempfile.TemporaryDirectory() as made:
        from models import ensure_model

        folder = options.model or ensure_model(Path(made), "llama", "float32")
        exits = list(itertools.islice(itertools.cycle(chosen), options.times))
        faults = collections.Counter()
        for number, end in enumerate(run_all(exits, folder, options.jobs, options.forks), 1):
            print(f"{number:3} {end.how!s:28} status {end.status} {end.seconds:6.1f} s {end.fault}", flush=True)
            if end.fault:
                faults[str(end.how)] += 1
                print(end.log[-6000:], flush=True)
    print(f"{len(exits)} ends, {sum(faults.values())} faults {dict(faults)}")
    return int(bool(faults))


if __name__ == "__main__":
    if "--end" in sys.argv:
        kept = run_and_end(sys.argv[sys.argv.index("--end") + 1], sys.argv[sys.argv.index("--model") + 1])
    elif "--serve" in sys.argv:
        kept = serve_forks()
    else:
        sys.exit(main())
