"""Tables, figures and origins of rendered documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def three_digits(value: float) -> str:
    """Return a number with three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def duration(milliseconds: float) -> str:
    """Return a time in seconds or milliseconds."""
    value, unit = (milliseconds / 1e3, "s") if milliseconds >= 1000 else (milliseconds, "ms")
    return f"{three_digits(value)} {unit}"


def table(rows: list[list[str]]) -> str:
    """Return rows of cells as a table; the first is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * len(rows[0])
    return "\n".join([head, rule, *body])


def link(source: Path) -> str:
    """Return a link to a results file, as seen from the root of the repository."""
    return f"[{source.name}](bench/results/{source.name})"


def origin(*measured: tuple[dict[str, Any], Path, str]) -> str:
    """Return a table of where figures come from: for each results file its commit, its command and the machine.

    Args:
        measured: Results, their file, and the machine in words.
    """
    rows = [
        [link(source), commit(results), f"`{results['command']}`", machine] for results, source, machine in measured
    ]
    return table([["results", "commit", "command", "machine"], *rows])


def commit(results: dict[str, Any]) -> str:
    """Return the commit that results were measured at, or the one that added them, for results from before that."""
    if "commit" in results:
        return f"`{results['commit']}`"
    return f"added in `{results['added_in']}`" if "added_in" in results else "unknown"


def gpu_machine(results: dict[str, Any]) -> str:
    """Return the machine of results of `bench/gpu.py`, in words."""
    machine = results["machine"]
    words = [
        machine["gpu"],
        f"{machine['cpus']} processors",
        f"Python {machine['python']}",
        f"torch {machine['torch']}",
        f"vLLM {machine['vllm']}",
    ]
    if rates := results.get("rates_gb_per_s"):
        words += [f"{rates['d2h']:.1f} GB/s to the host", f"{rates['device_copy']:.0f} GB/s on the device"]
    return ", ".join(words)


def cpu_machine(results: dict[str, Any], *packages: str) -> str:
    """Return the machine of results of a benchmark without a GPU, in words."""
    machine = results["machine"]
    words = [machine["cpu"], f"{machine['cores']} cores", machine["kernel"], f"Python {machine['python']}"]
    return ", ".join([*words, *(f"{name} {machine[name]}" for name in packages)])
