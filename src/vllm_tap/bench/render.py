"""Put the tables of results files into a document, so that no figure in it is typed by hand. A process of its own.

`python -m vllm_tap.bench.render README.md [--check]` replaces what stands between `<!-- bench:NAME -->` and
`<!-- /bench:NAME -->`; results are read from `bench/results` beside the document. With `--check` it writes nothing and
fails if the document is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench:[\w-]+ -->")


def render_handover(results_dir: Path) -> str:
    """Return the table of the hand-over from worker to client, a column for each case."""
    source = results_dir / "handover-cpu.json"
    results = json.loads(source.read_text())
    cases = results["cases"]
    head = ["", *(_case_title(case) for case in cases)]
    rows = [
        [rows[0]["label"], *(f"{_duration(row['median_ms'])} ({_ratio(row['x_memcpy'])})" for row in rows)]
        for rows in zip(*(case["rows"] for case in cases), strict=True)
    ]
    return _table([head, *rows]) + "\n\n" + _origin(results, source)


def render_gpu(results_dir: Path) -> str:
    """Return a table for every results file of `bench/gpu.py`, or a sentence if there is none."""
    sources = sorted(results_dir.glob("gpu-*.json"))
    if not sources:
        return "Nothing has been measured on a GPU yet."
    found = [(json.loads(source.read_text()), source) for source in sources]
    return "\n\n".join(_gpu_table(results, source) for results, source in found if results.get("rows"))


def render_seed(results_dir: Path) -> str:
    """Return the table of payloads out of a real engine, and that of the founding document's claims."""
    source = results_dir / "seed-cpu.json"
    results = json.loads(source.read_text())
    engine, machine = results["engine"], results["machine"]
    best = engine["rows"][-1]["median_ms"]
    title = _case_title({"name": "hidden states", **engine})
    ways = [["from the end of the last forward pass", title, "times the last line"]]
    ways += [[_seed_label(row), _duration(row["median_ms"]), _ratio(row["median_ms"] / best)] for row in engine["rows"]]
    claims = [["claim (estimates)", "lists, bytes, gain claimed", "measured here", "holds here"]]
    claims += [_claim_row(claim) for claim in results["claims"]]
    origin = (
        f"Medians of {engine['rows'][-1]['rounds']} interleaved rounds; {engine['model']}; claims are of conversion "
        f"alone, the last one of a call. {machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, Python "
        f"{machine['python']}, numpy {machine['numpy']}, torch {machine['torch']}; load average "
        f"{' before, '.join(map(str, results['load_average']))} after; `{results['command']}`; "
        f"[{source.name}](bench/results/{source.name})."
    )
    return _table(ways) + "\n\n" + _table(claims) + "\n\n" + origin


def _seed_label(row: dict[str, Any]) -> str:
    scale = row["scaled_by"]
    return f"{row['label']}" + (f" (measured on {row['measured_rows']} rows, times {scale})" if scale > 1 else "")


def _claim_row(claim: dict[str, Any]) -> list[str]:
    def figures(milliseconds: list[float], gain: float) -> str:
        return f"{_duration(milliseconds[0])}, {_duration(milliseconds[1])}, {_ratio(gain)}"

    return [
        claim["claim"],
        figures(claim["claimed_ms"], claim["claimed_gain"]),
        figures(claim["measured_ms"], claim["measured_gain"]),
        "yes" if claim["holds"] else "no",
    ]


def render_codecs(results_dir: Path) -> str:
    """Return the table of what each codec makes of hidden states."""
    source = results_dir / "codecs-cpu.json"
    results = json.loads(source.read_text())
    rows = [["codec", "bytes in / bytes out", "encode", "decode"]]
    rows += [
        [f"`{name}`", f"{row['ratio']:.2f}", f"{row['encode_gb_per_s']:.2f} GB/s", f"{row['decode_gb_per_s']:.2f} GB/s"]
        for name, row in results["results"].items()
    ]
    given, machine = results["input"], results["machine"]
    origin = (
        f"{given['bytes'] / 1e6:.1f} MB of {' and '.join(given['dtypes'])} hidden states of "
        f"{Path(given['metadata']['model']).name}; medians of {results['repeats']}, one core of {machine['cpu']}, "
        f"Python {machine['python']}, lz4 {machine['lz4']}, zstandard {machine['zstandard']}; `make bench-codecs`; "
        f"[{source.name}](bench/results/{source.name})."
    )
    return _table(rows) + "\n\n" + origin


FEW_STEPS = 20
"""Of as many steps or fewer, no length is given: they are prefill steps, each of another length."""

RENDERERS: dict[str, Callable[[Path], str]] = {
    "codecs": render_codecs,
    "gpu": render_gpu,
    "handover": render_handover,
    "seed": render_seed,
}
"""Marker name to the function that renders it from the folder of results."""


def render(text: str, results_dir: Path) -> str:
    """Return a document with every marked part rendered anew.

    Raises:
        ValueError: a marker has no partner, or a name that nothing renders.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in RENDERERS:
            raise ValueError(f"marker bench:{name} has no renderer; there are {sorted(RENDERERS)}")
        return f"{match[1]}{RENDERERS[name](results_dir)}\n{match[4]}"

    if stray := _MARKER.search(_MARKED.sub("", text)):
        raise ValueError(f"marker {stray[0]} has no partner, or text stands on its line")
    return _MARKED.sub(replace, text)


def main() -> None:
    """Render a document, or check it."""
    parser = argparse.ArgumentParser(prog="python -m vllm_tap.bench.render", description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the document is out of date")
    arguments = parser.parse_args()
    document: Path = arguments.document
    before = document.read_text()
    try:
        after = render(before, document.resolve().parent / "bench" / "results")
    except (ValueError, OSError) as error:
        raise SystemExit(f"{document}: {error}") from error
    if arguments.check and after != before:
        raise SystemExit(f"{document} is out of date: run python -m vllm_tap.bench.render {document}")
    if after != before:
        document.write_text(after)


def _case_title(case: dict[str, Any]) -> str:
    rows, width = case["shape"]
    name = case["name"].replace("_", " ")
    return f"{name}, {case['num_layers']} x ({rows}, {width}) {case['dtype']}, {case['nbytes'] / 1e6:.0f} MB"


def _duration(milliseconds: float) -> str:
    value, unit = (milliseconds / 1e3, "s") if milliseconds >= 1000 else (milliseconds, "ms")
    return f"{_three_digits(value)} {unit}"


def _ratio(value: float) -> str:
    return f"{_three_digits(value)}x"


def _gpu_table(results: dict[str, Any], source: Path) -> str:
    head = ["workload", "arm", "ratio to plain", "in pairs", "ms a step", "rows GB", "GB/s"]
    machine, rates = results["machine"], results["rates_gb_per_s"]
    origin = (
        f"Shape `{results['shape']}`{_ranks(results)}, medians; ratio: time of the plain engine over time of the arm; "
        f"in pairs: the median of the ratios within a round. {machine['gpu']}, "
        f"{machine['cpus']} processors, Python {machine['python']}, torch {machine['torch']}, vLLM {machine['vllm']}; "
        f"device to host {rates['d2h']:.1f} GB/s, copies on the device {rates['device_copy']:.0f} GB/s; "
        f"`{results['command']}`; [{source.name}](bench/results/{source.name})."
    )
    table = _table([head, *map(_gpu_row, results["rows"])]) + "\n\n" + origin
    return table + ("\n\n" + _forwards_table(results["forwards"]) if results.get("forwards") else "")


def _forwards_table(rows: list[dict[str, Any]]) -> str:
    """Return where on the device the time of a generation goes, in milliseconds."""
    head = ["the same, ms on the device", "arm", "before the first pass", "in passes", "between", "behind the last"]

    def cells(row: dict[str, Any]) -> list[str]:
        parts = [(ms["first armed"] + ms["first begins"], ms["passes"], ms["between"], ms["end"]) for ms in row["ms"]]
        return [row["workload"], row["arm"], *(f"{statistics.median(part):.1f}" for part in zip(*parts, strict=True))]

    return _table([head, *map(cells, rows)])


def _gpu_row(row: dict[str, Any]) -> list[str]:
    """Return the cells of an arm; plain and idle engines ship no rows."""
    gigabytes = row["bytes"] / 1e9
    moved = [_three_digits(gigabytes), _three_digits(gigabytes / row["seconds"])] if row["bytes"] else ["", ""]
    steps = [step["step_ms"] for step in row.get("steps", ()) if step["steps"] > FEW_STEPS]
    step = f"{statistics.median(steps):.3f}" if steps else ""
    return [row["workload"], row["arm"], f"{row['ratio']:.3f}", f"{row['paired']:.3f}", step, *moved]


def _ranks(results: dict[str, Any]) -> str:
    """Return how tensor-parallel ranks shared the bytes, if there were several."""
    shares = [f"{share:.2f}" for share in results.get("tp2_shares", ())]
    return f", {len(shares)} ranks which copied {' and '.join(shares)} of one rank's bytes" if shares else ""


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _table(rows: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" * len(rows[0])
    return "\n".join([head, rule, *body])


def _origin(results: dict[str, Any], source: Path) -> str:
    machine = results["machine"]
    rounds = {row["label"]: row["rounds"] for row in results["cases"][0]["rows"]}
    few = min(rounds.values())
    rare = [label for label, number in rounds.items() if number == few]
    return (
        f"Medians, and multiples of one memcpy of the same bytes in the same run. {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['kernel']}, Python {machine['python']}, numpy {machine['numpy']}, torch "
        f"{machine['torch']}; `{results['command']}`; "
        f"[{source.name}](bench/results/{source.name}). In the first column, {', '.join(rare)} ran in {few} round(s)."
    )


if __name__ == "__main__":
    main()
