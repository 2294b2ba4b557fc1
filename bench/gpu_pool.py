#!/usr/bin/env python3
"""Put the rounds of several calls of `bench/gpu.py` on the same kind of machine together, so that none is left out.

    python bench/gpu_pool.py first.json second.json --out bench/results/gpu-llama-8b.json

Engines differ from call to call by more than what an arm costs, and all arms of a call with them: the times of a call
are scaled to the plain engine's median over all calls. What is measured once a call stands in a list. What was put
together before may be among the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from gpu_ratios import summarise

SAME = "machine", "shape", "plain"
BETWEEN = "`, `"
"""Between the commands of calls, as documents show them."""

ROUNDS = "generate", "segments_gb", "steps"
"""What a row has one of for each round, beside the times."""


def pool(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the results of calls as if they were of one.

    Raises:
        ValueError: They are of different machines, shapes or kinds of plain engine, or of different arms of a workload;
            or a call measured no ratios.
    """
    if without := [call["command"] for call in calls if not call.get("rows")]:
        raise ValueError(f"calls that measured ratios can be put together, got {without[0]}.")
    for key in SAME:
        if different := [call[key] for call in calls if call[key] != calls[0][key]]:
            raise ValueError(f"calls of one {key} can be put together, got {calls[0][key]} and {different[0]}.")
    rates = [rate for call in calls for rate in call.get("rates_of_calls", [call["rates_gb_per_s"]])]
    return {
        **{key: calls[0][key] for key in SAME},
        "command": _each_once(calls, "command"),
        "commit": _each_once(calls, "commit"),
        "num_calls": sum(call.get("num_calls", 1) for call in calls),
        "rates_gb_per_s": {key: statistics.median(rate[key] for rate in rates) for key in rates[0]},
        "rates_of_calls": rates,
        "checks": [check for call in calls for check in _as_list(call["checks"])],
        "rows": _rows([call["rows"] for call in calls]),
        "parts": [part for call in calls for part in call.get("parts", [])],
    }


def _each_once(calls: list[dict[str, Any]], key: str) -> str:
    """Return the words that calls have under a key, each once."""
    return BETWEEN.join(dict.fromkeys(one for call in calls for one in call.get(key, "unknown").split(BETWEEN)))


def _as_list(checks: dict[str, Any] | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return checks if isinstance(checks, list) else [checks]


def _rows(calls: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    pooled = []
    for workload in dict.fromkeys(row["workload"] for rows in calls for row in rows):
        arms_of = [{row["arm"]: row for row in rows if row["workload"] == workload} for rows in calls]
        measured = [arms for arms in arms_of if arms]
        usual = statistics.median(seconds for arms in measured for seconds in arms["plain"]["all"])
        if different := [sorted(arms) for arms in measured if arms.keys() != measured[0].keys()]:
            raise ValueError(f"{workload}: calls of the same arms can be put together, got {different[0]} in one.")
        rows_of = {name: [arms[name] for arms in measured] for name in measured[0]}
        scales = [usual / arms["plain"]["seconds"] for arms in measured]
        summary = summarise(
            workload,
            {
                name: [seconds * scale for row, scale in zip(rows, scales, strict=True) for seconds in row["all"]]
                for name, rows in rows_of.items()
            },
            {name: [row["parts"] for row in rows if row["parts"]] for name, rows in rows_of.items()},
            {name: rows[0]["bytes"] for name, rows in rows_of.items()},
        )
        for row in summary:
            row |= {key: [one for call in rows_of[row["arm"]] for one in call[key]] for key in ROUNDS}
        pooled += summary
    return pooled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", type=Path, nargs="+", metavar="results")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    try:
        args.out.write_text(json.dumps(pool([json.loads(call.read_text()) for call in args.calls]), indent=1))
    except (ValueError, OSError) as error:
        raise SystemExit(f"gpu_pool: {error}") from error


if __name__ == "__main__":
    main()
