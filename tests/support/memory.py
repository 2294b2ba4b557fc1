"""What processes hold."""

from __future__ import annotations

from pathlib import Path


def held(pid: int) -> int:
    """Return bytes of a process that are no cache of files."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024
