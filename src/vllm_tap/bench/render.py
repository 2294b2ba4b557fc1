"""Put the tables of results files into a document, so that no figure in it is typed by hand. A process of its own.

`python -m vllm_tap.bench.render README.md [--check]` replaces what stands between `<!-- bench:NAME -->` and
`<!-- /bench:NAME -->`; results are read from `bench/results` beside the document or above. With `--check` it writes
nothing and fails if the document is not up to date.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

from vllm_tap.bench import cpu_tables, gpu_checks, gpu_tables

RESULTS = "bench/results"

_MARKED = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- /?bench:[\w-]+ -->")


RENDERERS: dict[str, Callable[[Path], str]] = {
    "bad-cases": gpu_checks.bad_cases,
    "codecs": cpu_tables.codecs,
    "copies": gpu_checks.copies,
    "gpu": gpu_tables.summary,
    "gpu-headlines": gpu_tables.headlines,
    "gpu-tables": gpu_tables.tables,
    "handover": cpu_tables.handover,
    "host": gpu_checks.host,
    "mechanisms": gpu_checks.mechanisms,
    "memory": gpu_checks.memory,
    "network": cpu_tables.network,
    "seed": cpu_tables.seed,
    "serve": cpu_tables.serve,
    "store": cpu_tables.store,
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


if __name__ == "__main__":
    main()
