"""`vllm-tap verify` of a dataset: every byte against its checksum. Runs in the user's process."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_tap.cli.table import columns, size_text


def is_dataset(name: str) -> bool:
    """Tell whether what was named is a dataset rather than a model."""
    from vllm_tap.store.places import place_of

    if "://" in name:
        return True
    return Path(name).is_dir() and bool(place_of(name).parts())


def run(options: argparse.Namespace) -> int:
    """Verify a dataset; 1 when anything is wrong."""
    from vllm_tap.store.verify import verify

    found = verify(options.model)
    if options.json:
        print(json.dumps({"path": options.model, "holds": not found.problems, **found._asdict()}))
    else:
        _report(options.model, found)
    return 1 if found.problems else 0


def _report(path: str, found: Any) -> None:
    rows = [
        ("dataset", path),
        ("parts", f"{found.num_parts:,}"),
        ("rows", f"{found.num_rows:,}"),
        ("bytes", f"{found.num_bytes:,} ({size_text(found.num_bytes)})"),
        ("unsealed", f"{len(found.unsealed):,}"),
        ("problems", f"{len(found.problems):,}"),
    ]
    print(columns(rows))
    for problem in found.problems:
        print(f"vllm-tap: {problem}", file=sys.stderr)
