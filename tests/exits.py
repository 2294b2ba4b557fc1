#!/usr/bin/env python3
"""Ends of processes whose engines are at work, and how they end: python tests/exits.py --times 50.

Each process starts an engine, captures, and ends in one of several ways. The last lines say how many ended and how.
The exit status is 1 if one ended by a signal, with another status than it should, not at all, or with a fault in its
log, be it that of its engine's process.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

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
    import signal

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


def run(how: Exit, folder: Path) -> End:
    """Start a process that ends in some way, and wait for it."""
    environment = os.environ | {
        "PYTHONFAULTHANDLER": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(how.process == "own")),
        "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    }
    for name, value in {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}.items():
        environment.setdefault(name, value)
    command = [sys.executable, __file__, "--end", str(how), "--model", str(folder)]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            status: int | None = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            status = None
            process.kill()
            process.wait()
        log.seek(0)
        return End(how, status, log.read(), time.monotonic() - began)


def run_all(exits: list[Exit], folder: Path, jobs: int) -> Iterator[End]:
    """Run some at a time; yield them in order."""
    with ThreadPoolExecutor(jobs) as threads:
        yield from threads.map(lambda how: run(how, folder), exits)


def main() -> int:
    """Run what was asked for and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50, help="processes in all")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
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
        for number, end in enumerate(run_all(exits, folder, options.jobs), 1):
            print(f"{number:3} {end.how!s:28} status {end.status} {end.seconds:6.1f} s {end.fault}", flush=True)
            if end.fault:
                faults[str(end.how)] += 1
                print(end.log[-6000:], flush=True)
    print(f"{len(exits)} ends, {sum(faults.values())} faults {dict(faults)}")
    return int(bool(faults))


if __name__ == "__main__":
    if "--end" in sys.argv:
        kept = run_and_end(sys.argv[sys.argv.index("--end") + 1], sys.argv[sys.argv.index("--model") + 1])
    else:
        sys.exit(main())
