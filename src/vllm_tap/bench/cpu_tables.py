"""Tables of the benchmarks that run on processors: hand-over, the payloads that it replaces, codecs, the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_tap.bench.markdown import cpu_machine, duration, origin, table, three_digits


def handover(results_dir: Path) -> str:
    """Return the table of the hand-over from worker to client, a column for each case."""
    results, source = _read(results_dir, "handover")
    cases = results["cases"]
    head = ["", *(_case_title(case) for case in cases)]
    rows = [
        [rows[0]["label"], *(f"{duration(row['median_ms'])} ({_times(row['x_memcpy'])})" for row in rows)]
        for rows in zip(*(case["rows"] for case in cases), strict=True)
    ]
    return table([head, *rows]) + "\n\n" + origin((results, source, cpu_machine(results, "numpy", "torch")))


def seed(results_dir: Path) -> str:
    """Return the table of payloads out of a real engine, and that of the founding document's claims."""
    results, source = _read(results_dir, "seed")
    engine = results["engine"]
    best = engine["rows"][-1]["median_ms"]
    ways = [["from the end of the last forward pass", _case_title({"name": "hidden states", **engine}), "ratio"]]
    ways += [[_seed_label(row), duration(row["median_ms"]), _times(row["median_ms"] / best)] for row in engine["rows"]]
    claims = [["claim (estimates)", "lists, bytes, gain claimed", "measured here", "holds here"]]
    claims += [_claim_row(claim) for claim in results["claims"]]
    machine = cpu_machine(results, "numpy", "torch")
    return "\n\n".join([table(ways), table(claims), origin((results, source, machine))])


def _seed_label(row: dict[str, Any]) -> str:
    scale = row["scaled_by"]
    return f"{row['label']}" + (f" (measured on {row['measured_rows']} rows, times {scale})" if scale > 1 else "")


def _claim_row(claim: dict[str, Any]) -> list[str]:
    def figures(milliseconds: list[float], gain: float) -> str:
        return f"{duration(milliseconds[0])}, {duration(milliseconds[1])}, {_times(gain)}"

    return [
        claim["claim"],
        figures(claim["claimed_ms"], claim["claimed_gain"]),
        figures(claim["measured_ms"], claim["measured_gain"]),
        "yes" if claim["holds"] else "no",
    ]


def codecs(results_dir: Path) -> str:
    """Return the table of what each codec makes of hidden states."""
    results, source = _read(results_dir, "codecs")
    given = results["input"]
    rows = [["codec", "bytes in / bytes out", "encode", "decode"]]
    rows += [
        [f"`{name}`", f"{row['ratio']:.2f}", f"{row['encode_gb_per_s']:.2f} GB/s", f"{row['decode_gb_per_s']:.2f} GB/s"]
        for name, row in results["results"].items()
    ]
    size = f"{given['bytes'] / 1e6:.1f} MB of {' and '.join(given['dtypes'])} hidden states"
    words = f"{size} of {Path(given['metadata']['model']).name}, medians of {results['repeats']}, one core."
    machine = cpu_machine(results, "lz4", "zstandard")
    return "\n\n".join([table(rows), words, origin((results, source, machine))])


def serve(results_dir: Path) -> str:
    """Return the table of a server under load, a row for what is captured of how many requests."""
    results, source = _read(results_dir, "serve")
    rows = [["captured", "requests/s", "ratio", "between tokens", "ratio", "99 % of them within"]]
    rows += [
        [
            row["arm"],
            three_digits(row["requests_per_s"]),
            f"{row['requests_ratio']:.3f}",
            duration(row["itl_ms"]),
            f"{row['itl_ratio']:.3f}",
            duration(row["p99_itl_ms"]),
        ]
        for row in results["rows"]
    ]
    load = f"{results['requests']} requests, {results['at_a_time']} at a time, of {results['input']} tokens"
    words = f"{results['model']}. {load}, {results['output']} generated for each; {results['rounds']} rounds."
    machine = cpu_machine(results, "torch", "vllm")
    return "\n\n".join([table(rows), words, origin((results, source, machine))])


def _read(results_dir: Path, name: str) -> tuple[dict[str, Any], Path]:
    source = results_dir / f"{name}-cpu.json"
    return json.loads(source.read_text()), source


def _case_title(case: dict[str, Any]) -> str:
    rows, width = case["shape"]
    name = case["name"].replace("_", " ")
    return f"{name}, {case['num_layers']} x ({rows}, {width}) {case['dtype']}, {case['nbytes'] / 1e6:.0f} MB"


def _times(value: float) -> str:
    return f"{three_digits(value)}x"
