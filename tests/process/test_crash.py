"""Writers of a dataset that are killed and gone on with; `python tests/crash.py --kills 500` is the long run."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_killed_writers_lose_and_double_nothing(tmp_path: Path) -> None:
    """In a process of its own, since forks and threads of other tests do not go together."""
    command = [sys.executable, str(TESTS / "crash.py"), "--kills", "6", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    counts = ast.literal_eval(done.stdout)
    assert min(counts["random"], counts["operations"]) >= 6, "a kill more may end the last dataset"
