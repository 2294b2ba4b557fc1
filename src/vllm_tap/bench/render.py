"""Put the tables of results files into a document, so that no figure in it is typed by hand. A process of its own.

`python -m vllm_tap.bench.render README.md [--check]` replaces what stands between `<!-- bench:NAME -->` and
`<!-- /bench:NAME -->`; results are read from `bench/results` beside the document. With `--check` it writes nothing and
fails if the document is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
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


RENDERERS: dict[str, Callable[[Path], str]] = {"handover": render_handover}
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
