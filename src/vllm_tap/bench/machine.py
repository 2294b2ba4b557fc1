"""The facts that a figure depends on: commit, processor, kernel, versions. Runs in any process of a benchmark."""

from __future__ import annotations

import itertools
import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

FILES: Final = {"--models", "--out"}
"""Arguments of benchmarks that name files."""


def describe_machine() -> dict[str, Any]:
    """Return the facts that every results file carries."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "torch": torch.__version__,
    }


def describe_commit() -> str:
    """Return the commit that is measured, with `-dirty` behind it where files differ from it.

    `VLLM_TAP_COMMIT` names it where the tree is a copy without its history; "unknown" where nothing does.
    """
    if named := os.environ.get("VLLM_TAP_COMMIT"):
        return named
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def describe_command(words: Sequence[str]) -> str:
    """Return the command of a benchmark, given its program and arguments.

    The places of files that it is given or writes are left out: they are this machine's own.
    """
    kept = [f"bench/{Path(words[0]).name}"]
    for before, word in itertools.pairwise(words):
        if not {before, word} & FILES and not word.startswith(tuple(f"{name}=" for name in FILES)):
            kept.append(word)
    return shlex.join(kept)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
