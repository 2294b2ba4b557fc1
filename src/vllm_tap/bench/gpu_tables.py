"""Tables of the results of `bench/gpu.py`: one of all ratios, and each file's own."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_tap.bench.markdown import gpu_machine, origin, table, three_digits

NOTHING = "Nothing has been measured on a GPU yet."

IDLE_IS_PLAIN = "idle engine"
"""Word of results whose plain engine is the one with taps."""

FEW_RUNS = 3
"""Of fewer runs no median is given."""

FEW_STEPS = 20
"""Of as many steps or fewer, no length is given: they are prefill steps, each of another length."""

MEANING = f"""All figures are medians.

- *Ratio*: time of the plain engine over time of the variant.
- *Paired*: the median of the ratios within a round.
- *Same steps*: the ratio of runs that took as many steps as most plain ones, of {FEW_RUNS} runs or more."""
"""Words about the ratios of all tables."""

ARMS = ("idle", "last position, all layers", "3 layers", "all layers", "router logits and experts")
"""The columns of the summary from the left: what asks for more comes later, and what nobody here made last."""

ASKED_STAGINGS = (" / staged", " / direct")
"""Ends of arms that ask for a way of staging: they stand in the table of their own file."""

MODELS = {"llama-8b": "Llama-3.1-8B", "qwen3-30b-a3b": "Qwen3-30B-A3B"}
"""Models whose shapes are measured, with dummy weights."""

HEADLINES = (
    ("llama-8b", "decode 8 x (64 + 128)", "all layers"),
    ("llama-8b", "decode 256 x (64 + 128)", "all layers"),
    ("llama-8b", "prefill 64 x 1000", "all layers"),
    ("qwen3-30b-a3b", "decode 8 x (64 + 128)", "router logits and experts"),
    ("qwen3-30b-a3b", "prefill 64 x 1000", "router logits and experts"),
)
"""Shape, workload and arm of the lines that the README shows."""

EXTRACT = "extract_hidden_states"
"""Arm of vLLM's own extraction."""

Line = tuple[str, str, str]
"""GPU, shape and workload."""


def summary(results_dir: Path) -> str:
    """Return one table of ratios, a line for each workload and a column for each arm; a sentence without any.

    Results without a plain engine are left out. The GPU that most was measured on comes first.
    """
    lines = _lines(results_dir)
    if not lines:
        return NOTHING
    arms = sorted({arm for line in lines.values() for arm in line}, key=_arm_order)
    weights = _weights(lines)

    def order(line: Line) -> tuple[Any, ...]:
        gpu, shape, workload = line
        return -weights[gpu], gpu, shape, [int(word) if word.isdigit() else word for word in workload.split()]

    body = [[*line, *(lines[line].get(arm, "") for arm in arms)] for line in sorted(lines, key=order)]
    return table([["GPU", "shape", "workload", *arms], *body])


def headlines(results_dir: Path) -> str:
    """Return the few ratios that a new reader needs, of the GPU that most was measured on."""
    lines = _lines(results_dir)
    if not lines:
        return NOTHING
    gpu, _ = _weights(lines).most_common(1)[0]
    rows = [["model", "workload", "captured", "ratio", "idle engine", f"vLLM's `{EXTRACT}`"]]
    for shape, workload, arm in HEADLINES:
        line = lines.get((gpu, shape, workload), {})
        ratios = [line.get(name, "").partition(" ")[0] for name in (arm, "idle", EXTRACT)]
        rows.append([MODELS[shape], _in_words(workload), arm, *ratios])
    return table(rows)


def _in_words(workload: str) -> str:
    """Return a workload such as "decode 8 x (64 + 128)" as a reader says it."""
    num_prompts, length, generated = re.fullmatch(r"\w+ (\d+) x \(?(\d+)(?: \+ (\d+)\))?", workload).groups("1")  # type: ignore[union-attr]
    return f"{num_prompts} prompts of {length} tokens, {generated} generated"


def _lines(results_dir: Path) -> dict[Line, dict[str, str]]:
    """Return the cell of each arm, by line; each ratio is that of as many steps where there is one."""
    lines: dict[Line, dict[str, str]] = {}
    for results, _ in _read(results_dir):
        rows = [] if _is_idle(results) else _measured(results)
        plain = {row["workload"]: row for row in rows if row["arm"] == "plain"}
        for row in rows:
            if row["arm"] != "plain" and not row["arm"].endswith(ASKED_STAGINGS):
                key = results["machine"]["gpu"], results["shape"] + _ranks(results), row["workload"]
                ratio = _ratio_alike(row, plain[row["workload"]]) or f"{row['ratio']:.3f}"
                lines.setdefault(key, {}).setdefault(
                    row["arm"].removesuffix(" / auto"), f"{ratio} ({row['paired']:.3f})"
                )
    return lines


def _weights(lines: dict[Line, dict[str, str]]) -> Counter[str]:
    """Return how many ratios there are of each GPU."""
    return Counter(gpu for (gpu, _, _), line in lines.items() for _ in line)


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
    head = ["workload", "variant", "ratio", "paired", "same steps", "ms a step", "rows GB", "GB/s"]
    rows = _measured(results)
    plain = {row["workload"]: row for row in rows if row["arm"] == "plain"}
    title = f"### {source.stem}: {results['machine']['gpu']}{_ranks(results)}"
    notes = " ".join(filter(None, (_shares(results), _calls(results), _plain(results))))
    where = origin((results, source, gpu_machine(results)))
    ratios = [table([head, *(_gpu_row(row, plain[row["workload"]]) for row in rows)])] if rows else []
    forwards = [_forwards_table(results["forwards"])] if results.get("forwards") else []
    return "\n\n".join(filter(None, [title, notes, *ratios, *forwards, where]))


def _forwards_table(rows: list[dict[str, Any]]) -> str:
    """Return where on the device the time of a generation goes, in milliseconds."""
    head = ["workload, ms on the device", "variant", "before the first pass", "in passes", "between", "after the last"]

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
    return (
        f"Rounds of {number} calls; all times of a call are scaled by those of its plain engine." if number > 1 else ""
    )


def _plain(results: dict[str, Any]) -> str:
    """Return a word of warning where no engine without the plugin ran."""
    return "The idle engine stands for a plain one." if _is_idle(results) else ""


def _ranks(results: dict[str, Any]) -> str:
    """Return how many tensor-parallel ranks there were, if several."""
    shares = results.get("tp2_shares")
    return f", {len(shares)} ranks" if shares else ""


def _shares(results: dict[str, Any]) -> str:
    """Return how tensor-parallel ranks shared the bytes, if there were several."""
    shares = [f"{share:.2f}" for share in results.get("tp2_shares", ())]
    return f"The ranks copied {' and '.join(shares)} of what one rank alone copies." if shares else ""
