"""Tables of the results of `bench/gpu.py`: one of all ratios, and each file's own."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_tap.bench.markdown import table, three_digits

NOTHING = "Nothing has been measured on a GPU yet."

IDLE_IS_PLAIN = "idle engine"
"""What results say of their plain engine if it is the one with taps."""

FEW_RUNS = 3
"""Of fewer runs no median is given."""

FEW_STEPS = 20
"""Of as many steps or fewer, no length is given: they are prefill steps, each of another length."""

MEANING = (
    "Medians. Ratio: time of the plain engine over time of the arm; in pairs: the median of the ratios within a round; "
    "of as many steps: the ratio of runs which took as many steps as most of the plain engine's, if there are "
    f"{FEW_RUNS} of either."
)
"""What tables say of their ratios."""

ARMS = ("idle", "last position, all layers", "3 layers", "all layers", "router logits and experts")
"""The columns of the summary from the left: what asks for more comes later, and what nobody here made last."""

ASKED_STAGINGS = (" / staged", " / direct")
"""How arms end that ask for a way of staging: they stand in the table of their own file."""


def summary(results_dir: Path) -> str:
    """Return one table of ratios, a line for each workload and a column for each arm; a sentence without any.

    What was measured more than once is taken from where the plain engine ran without the plugin; ratios of an idle
    engine say so. The GPU that most was measured on comes first.
    """
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    found = [results for results, _ in _read(results_dir)]
    for results in sorted(found, key=_is_idle):
        shape, of_idle = results["shape"] + _ranks(results), " of idle" if _is_idle(results) else ""
        for row in _measured(results):
            if row["arm"] != "plain" and not row["arm"].endswith(ASKED_STAGINGS):
                line = lines.setdefault((results["machine"]["gpu"], shape, row["workload"]), {})
                line.setdefault(
                    row["arm"].removesuffix(" / auto"), f"{row['ratio']:.3f} ({row['paired']:.3f}){of_idle}"
                )
    if not lines:
        return NOTHING
    arms = sorted({arm for line in lines.values() for arm in line}, key=_arm_order)
    weights = Counter(gpu for (gpu, _, _), line in lines.items() for _ in line)

    def order(line: tuple[str, str, str]) -> tuple[Any, ...]:
        gpu, shape, workload = line
        return -weights[gpu], gpu, shape, [int(word) if word.isdigit() else word for word in workload.split()]

    body = [[*line, *(lines[line].get(arm, "") for arm in arms)] for line in sorted(lines, key=order)]
    return table([["GPU", "shape", "workload", *arms], *body])


def _is_idle(results: dict[str, Any]) -> bool:
    """Tell whether times are compared with those of an idle engine with taps."""
    return bool(results.get("plain") == IDLE_IS_PLAIN)


def _arm_order(arm: str) -> tuple[int, str]:
    return ARMS.index(arm) if arm in ARMS else len(ARMS), arm


def tables(results_dir: Path) -> str:
    """Return a part with tables for every results file, or a sentence if there is none."""
    found = [_gpu_table(results, source) for results, source in _read(results_dir)]
    return "\n\n".join([MEANING, *found]) if found else NOTHING


def _read(results_dir: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """Yield the results that have ratios, with their files."""
    for source in sorted(results_dir.glob("gpu-*.json"), key=lambda source: source.stem):
        results = json.loads(source.read_text())
        if results.get("rows"):
            yield results, source


def _measured(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of results without those that ran once, which is no measurement."""
    return [row for row in results["rows"] if len(row["all"]) > 1]


def _gpu_table(results: dict[str, Any], source: Path) -> str:
    head = ["workload", "arm", "ratio to plain", "in pairs", "of as many steps", "ms a step", "rows GB", "GB/s"]
    rows = _measured(results)
    plain = {row["workload"]: row for row in rows if row["arm"] == "plain"}
    machine, rates = results["machine"], results["rates_gb_per_s"]
    title = f"### {source.stem}: {machine['gpu']}{_ranks(results)}"
    origin = (
        f"{_shares(results)}{_calls(results)}{'The idle engine stands for a plain one. ' if _is_idle(results) else ''}"
        f"{machine['cpus']} processors, Python {machine['python']}, torch {machine['torch']}, vLLM {machine['vllm']}; "
        f"device to host {rates['d2h']:.1f} GB/s, copies on the device {rates['device_copy']:.0f} GB/s; "
        f"`{results['command']}`; [{source.name}](bench/results/{source.name})."
    )
    ratios = [table([head, *(_gpu_row(row, plain[row["workload"]]) for row in rows)])] if rows else []
    forwards = [_forwards_table(results["forwards"])] if results.get("forwards") else []
    return "\n\n".join([title, origin, *ratios, *forwards])


def _forwards_table(rows: list[dict[str, Any]]) -> str:
    """Return where on the device the time of a generation goes, in milliseconds."""
    head = ["workload, ms on the device", "arm", "before the first pass", "in passes", "between", "behind the last"]

    def cells(row: dict[str, Any]) -> list[str]:
        parts = [(ms["first armed"] + ms["first begins"], ms["passes"], ms["between"], ms["end"]) for ms in row["ms"]]
        return [row["workload"], row["arm"], *(f"{statistics.median(part):.1f}" for part in zip(*parts, strict=True))]

    return table([head, *map(cells, rows)])


def _gpu_row(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    """Return the cells of an arm; plain and idle engines ship no rows."""
    gigabytes = row["bytes"] / 1e9
    moved = [three_digits(gigabytes), three_digits(gigabytes / row["seconds"])] if row["bytes"] else ["", ""]
    steps = [step["step_ms"] for step in row.get("steps", ()) if step["steps"] > FEW_STEPS]
    step = f"{statistics.median(steps):.3f}" if steps else ""
    ratios = [f"{row['ratio']:.3f}", f"{row['paired']:.3f}", _ratio_alike(row, plain)]
    return [row["workload"], row["arm"], *ratios, step, *moved]


def _ratio_alike(row: dict[str, Any], plain: dict[str, Any]) -> str:
    """Return the ratio among runs of the number of steps that is the most frequent one of the plain engine."""
    numbers = [step["steps"] for step in plain.get("steps", ())]
    if not numbers:
        return ""
    number = statistics.mode(numbers)
    theirs, mine = (
        [seconds for seconds, step in zip(arm["all"], arm.get("steps", ()), strict=False) if step["steps"] == number]
        for arm in (plain, row)
    )
    if min(len(theirs), len(mine)) < FEW_RUNS:
        return ""
    return f"{statistics.median(theirs) / statistics.median(mine):.3f}"


def _calls(results: dict[str, Any]) -> str:
    """Return of how many calls the rounds are, if of several."""
    number = results.get("num_calls", 1)
    return f"Rounds of {number} calls, all times of each scaled by those of its plain engine. " if number > 1 else ""


def _ranks(results: dict[str, Any]) -> str:
    """Return how many tensor-parallel ranks there were, if several."""
    shares = results.get("tp2_shares")
    return f", {len(shares)} ranks" if shares else ""


def _shares(results: dict[str, Any]) -> str:
    """Return how tensor-parallel ranks shared the bytes, if there were several."""
    shares = [f"{share:.2f}" for share in results.get("tp2_shares", ())]
    return f"The ranks copied {' and '.join(shares)} of what one rank alone copies. " if shares else ""
