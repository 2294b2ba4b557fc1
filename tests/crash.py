"""Kills writers of a dataset and goes on, until it is whole: `python tests/crash.py --kills 500`.

Runs in a process of its own. Each writer is a fork that is ended by SIGKILL, at a random instant or at the n-th
operation on the file system; another one resumes. The dataset at the end is compared with one that nobody disturbed.

With `--writers workers`, the workers of an engine in another fork write, and engine or client are killed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet  # noqa: F401 (once, not in each fork)

sys.path.insert(0, str(Path(__file__).parent / "support"))

import crashing_workers
from synthetic_rows import MODEL, SyntheticCapture, check_dataset, prompts_of
from vllm_tap.store import files, part
from vllm_tap.store.dataset import Dataset, open_dataset
from vllm_tap.store.places import place_of
from vllm_tap.store.recording import Run, record_with
from vllm_tap.store.verify import verify

RUN = Run(SyntheticCapture([]).spec, MODEL, "greedy", {"vllm_tap": "0"})
NUM_PROMPTS, BATCH = 24, 5
DONE = 7
STRIDE = 13
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


def ended(pid: int, lost: int = DONE) -> bool:
    """Wait for a fork; return whether it was done rather than killed, or than it has lost another one."""
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) or (lost != DONE and os.WEXITSTATUS(status) == lost):
        return False
    assert os.WEXITSTATUS(status) == DONE, "a writer failed where it should have gone on"
    return True


def killed_at(operation: int) -> Callable[[Path], None]:
    """Return a writer that kills itself at its n-th operation on the file system."""

    def write(folder: Path) -> None:
        kill_at(operation)
        record(folder)

    return write


def kill_at(operation: int, counts: Callable[[], bool] = lambda: True, victim: Callable[[], int] = os.getpid) -> None:
    """Have this process kill itself, or another one, at its n-th operation on the file system of those that count."""
    left = operation

    def count(*_: object) -> None:
        nonlocal left
        left -= counts()
        if left == -1:
            left = -2  # it is killed once
            os.kill(victim(), signal.SIGKILL)

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            count()
            return function(*arguments)

        return call

    os.write, os.fsync = counted(os.write), counted(os.fsync)
    sys.addaudithook(lambda event, _: count() if event in EVENTS else None)


def check_samples(dataset: Dataset) -> None:
    """Check what is there."""
    check_dataset(dataset, prompts_of(NUM_PROMPTS)[: len(dataset)])


def resumed(
    folder: Path, attempt: Callable[[Path], bool], check_held: Callable[[Dataset], None] = check_samples
) -> int:
    """Write until a writer is done; return how many were killed. Whatever is sealed can be read at any time."""
    kills, held = 0, 0
    while not attempt(folder):
        kills += 1
        sealed = part.sealed_parts(place_of(folder))
        assert len(sealed) >= held, "a sealed part is gone"
        held = len(sealed)
        if sealed:
            check_held(open_dataset(folder))
    return kills


def check(folder: Path, whole: Path) -> None:
    """Compare a dataset with one that was written without kills: rows, files, and nothing beside them."""
    check_dataset(open_dataset(folder), prompts_of(NUM_PROMPTS))
    check_files(folder, whole)


def check_files(folder: Path, whole: Path) -> None:
    """Compare the files, and nothing may be beside them."""
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


class Pair:
    """An engine and a client, of which either is killed at a random instant, and the engine while it writes.

    Args:
        root: Folder for everything.
        rng: Draws who is killed, and when.
    """

    def __init__(self, root: Path, rng: random.Random) -> None:
        self._root, self._rng = root, rng
        self._engine, self._number = 0, 0
        self.counts = {"client": 0, "engine": 0, "client writing": 0, "engine writing": 0, "datasets": 0}

    @property
    def _socket(self) -> Path:
        return self._root / f"engine-{self._number}"

    def start(self, kills_at: int = -1, victim: Callable[[], int] = os.getpid) -> None:
        """Start an engine, which kills itself or its client at the n-th operation of its writers on the file system."""
        self._number += 1
        hook = partial(kill_at, kills_at, is_writer, victim) if kills_at >= 0 else lambda: None
        self._engine = forked(partial(crashing_workers.serve, self._socket, 2, hook))

    def end(self) -> None:
        """Kill the engine, if there is one."""
        if self._engine:
            os.kill(self._engine, signal.SIGKILL)
            ended(self._engine)
            self._engine = 0

    def client(self, folder: Path, writers: str = "workers") -> int:
        """Start a client."""
        texts = prompts_of(NUM_PROMPTS)
        return forked(partial(crashing_workers.record, self._socket, folder, texts, BATCH, writers))

    def at_random(self, seconds: float) -> Callable[[Path], bool]:
        """Return an attempt that is killed at a random instant."""

        def attempt(folder: Path) -> bool:
            nonlocal seconds
            if not self._engine:
                self.start()
            client, kills_engine = self.client(folder), self._rng.random() < 0.5
            time.sleep(self._rng.uniform(0, seconds))
            if kills_engine:
                self.end()
            else:
                os.kill(client, signal.SIGKILL)
            is_done = ended(client, crashing_workers.LOST if kills_engine else DONE)
            seconds *= 0.8 if is_done else 1.1
            if not is_done:
                self.counts["engine" if kills_engine else "client"] += 1
            if not kills_engine:
                crashing_workers.require_nothing_left(self._socket)
            return is_done

        return attempt

    def at_operation(self, operation: int) -> Callable[[Path], bool]:
        """Return an attempt whose first engine, or first client, is killed while workers write, and the next is not."""
        left, kills_engine = [operation], self._rng.random() < 0.5

        def attempt(folder: Path) -> bool:
            is_first = bool(left)
            if is_first:
                self.end()
                victim = os.getpid if kills_engine else crashing_workers.client_pid
                self.start(left.pop(), victim)
            elif not self._engine:
                self.start()
            is_done = ended(self.client(folder), crashing_workers.LOST if is_first and kills_engine else DONE)
            if not is_done:
                self.counts["engine writing" if kills_engine else "client writing"] += 1
                if kills_engine:
                    ended(self._engine)
                    self._engine = 0
                else:
                    crashing_workers.require_nothing_left(self._socket)
            return is_done

        return attempt


def is_writer() -> bool:
    """Tell whether this is a thread of a worker that writes for a client."""
    return threading.current_thread().name.startswith("vllm-tap-writer") and crashing_workers.client_pid() > 0


def run_workers(num_kills: int, seed: int, root: Path) -> dict[str, int]:
    """Kill engines and clients at random instants, so many in all, and as many while workers write."""
    pair, whole = Pair(root, random.Random(seed)), root / "whole"
    pair.start()
    assert ended(pair.client(whole, "client"))
    begin = time.perf_counter()
    assert ended(pair.client(root / "timed"))
    seconds = time.perf_counter() - begin

    def to_the_end(attempt: Callable[[Path], bool]) -> None:
        folder = root / f"run-{pair.counts['datasets']}"
        resumed(folder, attempt, lambda dataset: None)
        check_files(folder, whole)
        shutil.rmtree(folder)
        pair.counts["datasets"] += 1

    while pair.counts["client"] + pair.counts["engine"] < num_kills:
        to_the_end(pair.at_random(seconds))
    # Every so many: those of a run are some hundreds, which are alike.
    for operation in range(0, STRIDE * num_kills, STRIDE):
        to_the_end(pair.at_operation(operation))
    pair.end()
    return pair.counts


def main() -> None:
    """Run as many kills as were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; by default a folder for a while")
    parser.add_argument("--writers", choices=("client", "workers"), default="client", help="who writes rows")
    options = parser.parse_args()
    kill = run_workers if options.writers == "workers" else run
    with tempfile.TemporaryDirectory(dir=options.folder) as root:
        print(kill(options.kills, options.seed, Path(root)))


if __name__ == "__main__":
    main()
