"""Put the tables of results files into a document, so that no figure in it is typed by hand. A process of its own.

`python -m vllm_tap.bench.render README.md [--check]` replaces what stands between `<!-- bench:NAME -->` and
`<!-- /bench:NAME -->`; results are read from `bench/results` beside the document or above. With `--check` it writes
nothing and fails if the document is not up to date.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_tap.bench import gpu_tables
from vllm_tap.bench.markdown import table, three_digits

RESULTS = "bench/results"

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
    return table([head, *rows]) + "\n\n" + _origin(results, source)


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
    return table(ways) + "\n\n" + table(claims) + "\n\n" + origin


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
    return table(rows) + "\n\n" + origin


RENDERERS: dict[str, Callable[[Path], str]] = {
    "codecs": render_codecs,
    "gpu": gpu_tables.summary,
    "gpu-tables": gpu_tables.tables,
    "handover": render_handover,
    "seed": render_seed,
}
"""Marker name to the function that renders it from the folder of results."""


def render(text: str, results_dir: Path, link: str = RESULTS) -> str:
    """Return a document with every marked part rendered anew; `link` is where the results lie, seen from there.

    Raises:
        ValueError: a marker has no partner, or a name that nothing renders.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in RENDERERS:
            raise ValueError(f"marker bench:{name} has no renderer; there are {sorted(RENDERERS)}")
        body = RENDERERS[name](results_dir).replace(f"]({RESULTS}/", f"]({link}/")
        return f"{match[1]}{body}\n{match[4]}"

    if stray := _MARKER.search(_MARKED.sub("", text)):
        raise ValueError(f"marker {stray[0]} has no partner, or text stands on its line")
    return _MARKED.sub(replace, text)


def main() -> None:
    """Render documents, or check them."""
    parser = argparse.ArgumentParser(prog="python -m vllm_tap.bench.render", description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path, nargs="+", metavar="document")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a document is out of date")
    arguments = parser.parse_args()
    for document in arguments.documents:
        try:
            before = document.read_text()
            folder = _results_of(document)
            after = render(before, folder, os.path.relpath(folder, document.resolve().parent))
        except (ValueError, OSError) as error:
            raise SystemExit(f"{document}: {error}") from error
        if arguments.check and after != before:
            raise SystemExit(f"{document} is out of date: run python -m vllm_tap.bench.render {document}")
        if after != before:
            document.write_text(after)


def _results_of(document: Path) -> Path:
    """Return the folder of results beside a document, or above."""
    for folder in document.resolve().parents:
        if (folder / RESULTS).is_dir():
            return folder / RESULTS
    raise FileNotFoundError(f"there is no {RESULTS} beside this document or above")


def _case_title(case: dict[str, Any]) -> str:
    rows, width = case["shape"]
    name = case["name"].replace("_", " ")
    return f"{name}, {case['num_layers']} x ({rows}, {width}) {case['dtype']}, {case['nbytes'] / 1e6:.0f} MB"


def _duration(milliseconds: float) -> str:
    value, unit = (milliseconds / 1e3, "s") if milliseconds >= 1000 else (milliseconds, "ms")
    return f"{three_digits(value)} {unit}"


def _ratio(value: float) -> str:
    return f"{three_digits(value)}x"


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
