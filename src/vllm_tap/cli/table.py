"""Tables of the terminal, and what a finished capture says of itself. Runs in the user's process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm_tap.streams import SINGLE_STREAMS


def columns(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Align rows of cells; the columns named in `right` are set against their right edge."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def print_json(**values: Any) -> None:
    """Print one JSON object on a line."""
    print(json.dumps(values), flush=True)


def summary(result: Any) -> str:
    """Return the table of a capture: how much, and in what time.

    Args:
        result: A `Capture`.
    """
    total, after = total_seconds(result), result.seconds["finish"] + result.seconds["check"]
    nbytes = result.num_bytes
    rows = [
        ("samples", f"{len(result):,}"),
        ("rows", f"{result.num_rows:,}"),
        *((name, "yes" if name in SINGLE_STREAMS else layer_text(on)) for name, on in result.layers.items()),
        ("bytes", f"{nbytes:,} ({size_text(nbytes)})"),
        ("seconds", f"{total:.3f}"),
        ("rate", rate_text(nbytes / total)),
        ("after the last forward", f"{after * 1e3:.1f} ms, {after / total:.2%} of the time"),
    ]
    return columns(rows)


def total_seconds(result: Any) -> float:
    """Return the time of a capture; `wait` is inside `finish`."""
    return sum(float(result.seconds[part]) for part in ("start", "generate", "finish", "check"))


def layer_text(layers: Sequence[int]) -> str:
    """Return layers as runs: `30 layers: 0-29`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"{len(layers)} layer{'' if len(layers) == 1 else 's'}: {text}"


def rate_text(bytes_per_second: float) -> str:
    """Return a rate in decimal units, as buses and disks state theirs."""
    for unit, factor in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_second >= 0.1 * factor:
            return f"{bytes_per_second / factor:.2f} {unit}"
    return f"{bytes_per_second / 1e3:.2f} kB/s"


def size_text(nbytes: float) -> str:
    """Return a number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} GiB"
