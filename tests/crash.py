"""Kills writers of a dataset and goes on, until it is whole: `python tests/crash.py --kills 500`.

Runs in a process of its own. Each writer is a fork that is ended by SIGKILL, at a random instant or at the n-th
operation on the file system; another one resumes. The dataset at the end is compared with one that nobody disturbed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet  # noqa: F401 (once, not in each fork)

sys.path.insert(0, str(Path(__file__).parent / "support"))

from synthetic_rows import MODEL, SyntheticCapture, check_dataset, prompts_of
from vllm_tap.store import files, part
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.places import place_of
from vllm_tap.store.recording import Run, record_with
from vllm_tap.store.verify import verify

RUN = Run(SyntheticCapture([]).spec, MODEL, "greedy", {"vllm_tap": "0"})
NUM_PROMPTS, BATCH = 24, 5
DONE = 7
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "fcntl.flock", "shutil.rmtree"}


def record(folder: Path) -> Dataset:
    """Record what is left into a folder, in chunks of a few rows."""
    files.CHUNK_BYTES = 256
    return record_with(SyntheticCapture, prompts_of(NUM_PROMPTS), folder, RUN, resume=True, batch=BATCH)


def forked(child: Callable[[], None]) -> int:
    """Run a function in a fork, which ends with `DONE` behind it."""
    pid = os.fork()
    if pid:
        return pid
    try:
        child()
        os._exit(DONE)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)


def ended(pid: int) -> bool:
    """Wait for a fork; return whether it was done rather than killed."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    assert os.WEXITSTATUS(status) == DONE, "a writer failed where it should have gone on"
    return True


def killed_at(operation: int) -> Callable[[Path], None]:
    """Return a writer that kills itself at its n-th operation on the file system."""

    def write(folder: Path) -> None:
        left = operation

        def count(*_: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def counted(function: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object) -> object:
                count()
                return function(*arguments)

            return call

        os.write, os.fsync = counted(os.write), counted(os.fsync)
        sys.addaudithook(lambda event, _: count() if event in EVENTS else None)
        record(folder)

    return write


def resumed(folder: Path, attempt: Callable[[Path], bool]) -> int:
    """Write until a writer is done; return how many were killed. Whatever is sealed can be read at any time."""
    kills, held = 0, 0
    while not attempt(folder):
        kills += 1
        sealed = part.sealed_parts(place_of(folder))
        assert len(sealed) >= held, "a sealed part is gone"
        held = len(sealed)
        if sealed:
            dataset = open_dataset(folder)
            check_dataset(dataset, prompts_of(NUM_PROMPTS)[: len(dataset)])
    return kills


def check(folder: Path, whole: Path) -> None:
    """Compare a dataset with one that was written without kills: rows, files, and nothing beside them."""
    check_dataset(open_dataset(folder), prompts_of(NUM_PROMPTS))
    assert verify(folder).problems == []
    mine, other = ([one.manifest for one in part.sealed_parts(place_of(at))] for at in (folder, whole))
    assert [one.files for one in mine] == [one.files for one in other]
    left = [path.name for path in folder.iterdir() if not path.name.startswith("part-")]
    assert left == [".lock"], left


def at_random(seconds: float, rng: random.Random) -> Callable[[Path], bool]:
    """Return an attempt whose writer is killed at a random instant, mostly before it is done."""

    def attempt(folder: Path) -> bool:
        nonlocal seconds
        pid = forked(lambda: record(folder) and None)
        time.sleep(rng.uniform(0, seconds))
        os.kill(pid, signal.SIGKILL)
        is_done = ended(pid)
        seconds *= 0.8 if is_done else 1.1  # the machine has other things to do, more or less
        return is_done

    return attempt


def at_operations(operations: range) -> Callable[[Path], bool]:
    """Return an attempt whose writers are killed at these operations, one behind the other, and the last is not."""
    left = list(operations)

    def attempt(folder: Path) -> bool:
        write = killed_at(left.pop(0)) if left else lambda at: record(at) and None
        return ended(forked(lambda: write(folder)))

    return attempt


def run(num_kills: int, seed: int, root: Path) -> dict[str, int]:
    """Kill so many writers at random instants, and as many again, one for each operation of a run."""
    rng = random.Random(seed)
    whole = root / "whole"
    ended(forked(lambda: record(whole) and None))
    begin = time.perf_counter()
    ended(forked(lambda: record(root / "timed") and None))
    seconds = time.perf_counter() - begin
    counts = {"random": 0, "operations": 0, "datasets": 0}
    while counts["random"] < num_kills:
        folder = root / f"random-{counts['datasets']}"
        counts["random"] += resumed(folder, at_random(seconds, rng))
        counts["datasets"] += 1
        check(folder, whole)
        shutil.rmtree(folder)
    for operation in range(num_kills):
        folder = root / f"operation-{operation}"
        # The first writer is killed there, the next one soon after it has begun, while it cleans up.
        kills = resumed(folder, at_operations(range(operation, operation + 1)))
        counts["operations"] += kills
        check(folder, whole)
        shutil.rmtree(folder)
        if not kills:
            break
    return counts


def main() -> None:
    """Run as many kills as were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; by default a folder for a while")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        print(run(options.kills, options.seed, Path(root)))


if __name__ == "__main__":
    main()
