"""Tables of what `bench/gpu.py` measures besides ratios: memory, short generations, copies, bad cases, mechanisms."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_tap.bench.markdown import commit, gpu_machine, link, origin, table

MIB = 1 << 20

HELD = {
    "reserved": "PyTorch, all of it",
    "graphs": "PyTorch's pool for CUDA graphs",
    "driver": "driver, outside PyTorch",
}
"""Kinds of device memory that `--plan memory` counts, in words."""


def memory(results_dir: Path) -> str:
    """Return what an idle engine holds with the plugin beyond one without, a column for each shape."""
    found = list(_having(results_dir, "memory"))
    head = ["MiB held with the plugin, beyond an engine without it", *(results["shape"] for results, _ in found)]
    rows = [["blocks of KV cache, without and with", *(_blocks(results["memory"]) for results, _ in found)]]
    rows += [[words, *(_more(results["memory"], kind) for results, _ in found)] for kind, words in HELD.items()]
    return table([head, *rows]) + "\n\n" + _origins(found)


def _last_pair(engines: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last engine without the plugin and the last with it: the first of a kind also compiles."""
    (without,), (tapped,) = ([one for one in engines if one["tapped"] is kind][-1:] for kind in (False, True))
    return without, tapped


def _blocks(engines: list[dict[str, Any]]) -> str:
    without, tapped = _last_pair(engines)
    return f"{without['blocks']:,} and {tapped['blocks']:,}"


def _more(engines: list[dict[str, Any]], kind: str) -> str:
    without, tapped = _last_pair(engines)
    return f"{(tapped['idle'][kind] - without['idle'][kind]) / MIB:.0f}"


def host(results_dir: Path) -> str:
    """Return times and page faults of short generations, with the plugin and without, engines of a kind in turn."""
    found = list(_having(results_dir, "hosts"))
    rows = [["workload", "engines with the plugin", "ms", "without it, in turn", "page faults a step", "without it"]]
    for results, _ in found:
        cases: dict[tuple[str, str], list[tuple[dict[str, Any], dict[str, Any]]]] = {}
        # Each arm stands in front of the plain engine that took turns with it.
        for arm, plain in zip(results["hosts"][::2], results["hosts"][1::2], strict=True):
            cases.setdefault((arm["workload"], arm["case"]), []).append((arm, plain))
        for case, pairs in cases.items():
            rows.append([*case, *_means(pairs, "ms"), *_means(pairs, "faults")])
    return table(rows) + "\n\n" + _origins(found)


def _means(pairs: list[tuple[dict[str, Any], dict[str, Any]]], key: str) -> list[str]:
    return [f"{statistics.mean(engine[key] for engine in engines):.1f}" for engines in zip(*pairs, strict=True)]


def copies(results_dir: Path) -> str:
    """Return how fast copies ran beside the rate that the same call measured, a line for each results file."""
    rows = [["GPU", "shape", "workload", "copies a capture", "share of the rate", "results", "commit"]]
    for results, source in _having(results_dir, "parts"):
        for part in results["parts"]:
            shares = [(dma["copies"], dma["share_of_d2h"]) for dma in part["dma"]]
            number, share = (statistics.median(values) for values in zip(*shares, strict=True))
            cells = [results["machine"]["gpu"], results["shape"], part["workload"], f"{number:.1f}", f"{share:.3f}"]
            rows.append([*cells, link(source), commit(results)])
    return table(rows)


def bad_cases(results_dir: Path) -> str:
    """Return the verdict on each bad case, a column for each results file."""
    found = list(_having(results_dir, "cases"))
    verdicts = [{case["case"]: case["verdict"] for case in results["cases"]} for results, _ in found]
    names = dict.fromkeys(name for column in verdicts for name in column)
    head = ["case", *(results["machine"]["gpu"] for results, _ in found)]
    rows = [[name, *(column.get(name, "").lower() for column in verdicts)] for name in names]
    return table([head, *rows]) + "\n\n" + _origins(found)


def mechanisms(results_dir: Path) -> str:
    """Return what single mechanisms of the CUDA side bring, a line for each."""
    rows = [["mechanism", "measured", "without", "with", "command", "machine", "commit"]]
    for row in json.loads((results_dir / "mechanisms.json").read_text())["rows"]:
        cells = [row[key] for key in ("mechanism", "measured", "without", "with")]
        command = f"`{row['command']}`" if row["command"] else "not recorded"
        rows.append([*cells, command, row["machine"] or "not recorded", commit(row)])
    return table(rows)


def _having(results_dir: Path, key: str) -> Iterator[tuple[dict[str, Any], Path]]:
    for source in sorted(results_dir.glob("gpu-*.json"), key=lambda source: source.stem):
        results = json.loads(source.read_text())
        if results.get(key):
            yield results, source


def _origins(found: list[tuple[dict[str, Any], Path]]) -> str:
    return origin(*((results, source, gpu_machine(results)) for results, source in found))
