"""`vllm-tap export`: a dataset as a folder that another program reads. Runs in the user's process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Final

from vllm_tap.cli import arguments
from vllm_tap.cli.table import columns

OPTIONS: Final = ("layers", "last", "loss", "algorithm", "context_size", "packing", "dtype", "seed")
"""Options of the forms, each passed on where it was given."""


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write a dataset as another program reads it",
        description="Write a dataset as another program reads it. The folder is there whole or not at all. Which "
        "options a form takes: docs/interchange.md.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder of a dataset, or a URL that fsspec knows")
    parser.add_argument(
        "--to",
        required=True,
        metavar="NAME",
        help="speculators, specforge, modelopt, deepspec, saelens, hf or npz",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    arguments.add_json_option(parser)
    _add_form_options(parser)
    parser.set_defaults(run=run)


def _add_form_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("options of the forms")
    group.add_argument("--layers", type=arguments.layers, metavar="LAYERS", help="such as 1,15,28; by vllm-tap's count")
    group.add_argument("--last", metavar="NORM", help="modelopt: the last state is pre-norm or post-norm")
    group.add_argument("--loss", metavar="TOKENS", help="drafts: generated (default), all or metadata")
    group.add_argument("--algorithm", metavar="NAME", help="specforge: eagle3 (default), dflash or dspark")
    group.add_argument("--context-size", type=arguments.positive, metavar="N", help="saelens: rows of a context")
    group.add_argument("--packing", metavar="HOW", help="saelens: contexts lie within a sequence, or go across")
    group.add_argument("--dtype", metavar="NAME", help="saelens, hf: float32 (default) or float16")
    group.add_argument("--seed", type=int, metavar="N", help="saelens: seed of the order (default 0)")


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from vllm_tap.interchange.export import export, require_form
    from vllm_tap.store.dataset import open_dataset

    given = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) is not None}
    require_form(options.to, given)  # before a dataset is opened
    facts = export(open_dataset(options.dataset), options.to, options.out, **given)
    if options.json:
        print(json.dumps({"path": str(options.out), **facts}))
    else:
        print(columns([("path", str(options.out)), *_table(facts)]))
    return 0


def _table(facts: dict[str, Any]) -> list[tuple[str, str]]:
    left_out = ("format", "model", "conventions")
    return [(name.replace("_", " "), _text(value)) for name, value in facts.items() if name not in left_out]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
