"""`vllm-tap inspect`: facts of a dataset, and one of its samples. Runs in the user's process."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, Final

from vllm_tap.cli import arguments
from vllm_tap.cli.table import columns, layer_text, size_text
from vllm_tap.errors import RowsMissingError

SHOWN_CHARACTERS: Final = 200


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="say what is in a dataset",
        description="Say what is in a dataset: model, streams, layers, rows, and where rows come from. With --sample, "
        "what is known of one sample.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder of a dataset, or a URL that fsspec knows")
    parser.add_argument("--sample", type=int, metavar="N", help="a sample; negative numbers count from the last")
    arguments.add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from vllm_tap.store.dataset import open_dataset

    dataset = open_dataset(options.dataset)
    if options.sample is None:
        print_facts(dataset, options.json)
        return 0
    try:
        sample = dataset.sample(options.sample)
    except IndexError as error:
        raise RowsMissingError(f"{error}.", sample=options.sample) from error
    row = dataset.record(sample.index, sample.completion)._asdict()
    if options.json:
        print(json.dumps(row, ensure_ascii=False))
    else:
        print(columns([(name.replace("_", " "), _short(value)) for name, value in row.items()]))
    return 0


def print_facts(dataset: Any, as_json: bool) -> None:
    """Print what holds for all rows of a dataset."""
    facts = dataset.facts
    if as_json:
        streams = {one.name: {"layers": one.layers, "width": one.width, "dtype": one.dtype} for one in facts.streams}
        print(
            json.dumps(
                {
                    "path": dataset.path,
                    "parts": len(dataset.parts),
                    "samples": len(dataset),
                    "rows": dataset.num_rows,
                    "bytes": dataset.num_bytes,
                    "model": facts.model,
                    "spec": json.loads(facts.spec),
                    "sampling": facts.sampling,
                    "streams": streams,
                    "conventions": facts.conventions,
                    "versions": facts.versions,
                }
            )
        )
        return
    print(columns(list(_table(dataset))))


def _table(dataset: Any) -> Sequence[tuple[str, str]]:
    facts = dataset.facts
    rows = [
        ("dataset", dataset.path),
        ("model", " ".join(facts.model[name] for name in ("name", "revision", "dtype") if name in facts.model)),
        ("parts", f"{len(dataset.parts):,}"),
        ("samples", f"{len(dataset):,}"),
        ("rows", f"{dataset.num_rows:,}"),
        ("bytes", f"{dataset.num_bytes:,} ({size_text(dataset.num_bytes)})"),
    ]
    for stream in facts.streams:
        rows.append((stream.name, f"{stream.width} x {stream.dtype}, {layer_text(stream.layers)}"))
    rows += [(f"  {name}", text) for name, text in facts.conventions.items()]
    return rows


def _short(value: Any) -> str:
    text = "" if value is None else str(value)
    text = text.replace("\n", "\\n")
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
