"""Tables of the benchmarks that run on processors: hand-over, the payloads that it replaces, codecs, the server."""

from __future__ import annotations

import json
from collections.abc import Callable
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


def store(results_dir: Path) -> str:
    """Return the table of datasets against plain files, a column for each folder that was measured."""
    read = [_read(results_dir, name) for name in ("store", "store-memory")]
    rows = [["", *(results["folder"] for results, _ in read)]]
    rows += [[label, *(words(results) for results, _ in read)] for label, words in STORE_ROWS.items()]
    measured = [(results, source, cpu_machine(results, "numpy", "torch")) for results, source in read]
    return table(rows) + "\n\n" + origin(*measured)


def _rate(results: dict[str, Any], ours: str, theirs: str, ratio: str) -> str:
    values = f"{three_digits(results[ours])} of {three_digits(results[theirs])}"
    return f"{values} GB/s ({results[ratio]:.2f})"


def _opening(results: dict[str, Any], kind: str) -> str:
    if f"open_{kind}_ms" not in results:
        return ""
    return f"{duration(results[f'open_{kind}_ms'])}, {duration(results[f'first_row_{kind}_ms'])}"


STORE_ROWS: dict[str, Callable[[dict[str, Any]], str]] = {
    "writing, of plain files in the same pieces": lambda found: _rate(
        found, "write_gb_per_s", "plain_write_gb_per_s", "write_ratio"
    ),
    "open 20 GB in 75 parts, then the first row, pages in memory": lambda found: _opening(found, "warm"),
    "the same, pages not in memory": lambda found: _opening(found, "cold"),
    "single rows at random, of plain maps": lambda found: (
        f"{found['rows_per_s']:.0f} of {found['plain_rows_per_s']:.0f} a second ({found['rows_ratio']:.2f})"
    ),
    "shuffled batches, of plain maps read in order": lambda found: _rate(
        found, "shuffled_gb_per_s", "sequential_gb_per_s", "shuffled_ratio"
    ),
}
"""Row of the table of datasets to its words."""


def network(results_dir: Path) -> str:
    """Return the table of rates of rows over TCP, a row for each link."""
    results, source = _read(results_dir, "tcp")
    rows = [["link", "`iperf3`", "rows without a codec", 'rows with codec="auto"']]
    for name, rates in results["bytes_per_second"].items():
        raw, auto = rates["raw"], rates.get("auto")
        chosen = f"{_mb(auto)} by `{rates['auto took']}` ({_times(auto / raw)})" if auto else "none within a host"
        rows.append([name, _mb(rates["iperf3"]), f"{_mb(raw)} ({_times(raw / rates['iperf3'])})", chosen])
    words = f"{results['mib']} MiB of bfloat16 hidden states at a time, medians of {results['rounds']}, no TLS."
    machine = cpu_machine(results, "numpy")
    return "\n\n".join([table(rows), words, origin((results, source, machine))])


def _mb(bytes_per_second: float) -> str:
    return f"{three_digits(bytes_per_second / 1e6)} MB/s"


def serve(results_dir: Path) -> str:
    """Return the tables of servers under load, for each machine one with a row for what is captured."""
    return "\n\n".join(
        _served(json.loads(source.read_text()), source) for source in sorted(results_dir.glob("serve-*"))
    )


def _served(results: dict[str, Any], source: Path) -> str:
    head = ["requests/s", "ratio", "between tokens", "ratio", "99 % of them within", "processor time", "ratio"]
    rows = [["captured", *head]]
    rows += [
        [
            row["arm"],
            three_digits(row["requests_per_s"]),
            f"{row['requests_ratio']:.3f}",
            duration(row["itl_ms"]),
            f"{row['itl_ratio']:.3f}",
            duration(row["p99_itl_ms"]),
            duration(row["cpu_ms"]),
            f"{row['cpu_ratio']:.3f}",
        ]
        for row in results["rows"]
    ]
    load = f"{results['requests']} requests, {results['at_a_time']} at a time, of {results['input']} tokens"
    more = f"{results['output']} generated for each, give or take {results['spread']:.0%}"
    words = f"{results['model']}. {load}, {more}; {results['rounds']} rounds."
    machine = cpu_machine(results, "torch", "vllm")
    if devices := results["machine"].get("devices"):
        machine = f"{', '.join(devices)}; {machine}"
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
