"""Datasets whose files were changed; `python tests/hostile_dataset.py` makes a million of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def test_changed_files_are_refused_or_read_right() -> None:
    """In a process of its own, whose memory is bounded. All kinds of files were changed, and most are refused."""
    command = [sys.executable, str(TESTS / "hostile_dataset.py"), "--count", "800"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    kinds = {name.partition(":")[0] for name in counts}
    assert kinds == {"manifest", "forged manifest", "forged facts", "index", "forged index", "header", "length"}
    assert sum(count for name, count in counts.items() if name.endswith("refused")) > 500
