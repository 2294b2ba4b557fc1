"""Writers of a dataset that are killed and gone on with; `python tests/crash.py --kills 500` is the long run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def counts_of(folder: Path, num_kills: int, *options: str) -> dict[str, int]:
    """Kill, in a process of its own, since forks and threads of other tests do not go together."""
    command = [sys.executable, str(TESTS / "crash.py"), "--kills", str(num_kills), "--folder", str(folder), *options]
    # In a session of its own: none of its signals may reach this process.
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False, start_new_session=True)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = ast.literal_eval(done.stdout)
    return counts


def test_killed_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    """At random instants, and at operations on the file system."""
    counts = counts_of(tmp_path, 6)
    assert min(counts["random"], counts["operations"]) >= 6, "a kill more may end the last dataset"


def test_engines_and_clients_that_are_killed_while_workers_write(tmp_path: Path) -> None:
    """Of two ranks, through their sockets: nothing is lost or doubled, and an engine that lives keeps nothing."""
    counts = counts_of(tmp_path, 3, "--writers", "workers")
    assert counts["client"] + counts["engine"] >= 3
    assert counts["client writing"] + counts["engine writing"] >= 3
