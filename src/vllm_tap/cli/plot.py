"""`vllm-tap plot`: pictures of a dataset. Runs in the user's process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from vllm_tap.cli import arguments
from vllm_tap.errors import SpecError
from vllm_tap.spec import nearest


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "plot",
        help="draw pictures of a dataset",
        description="Draw pictures of a dataset: norms by layer and position, cosine between layers, use of experts, "
        "entropy of the router, principal components of a layer. Needs matplotlib.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder of a dataset, or a URL that fsspec knows")
    parser.add_argument(
        "plots",
        metavar="PLOT",
        nargs="*",
        help="norms, cosine, experts, entropy, pca; all that can be, if none is named",
    )
    parser.add_argument("--to", type=Path, default=Path(), metavar="FOLDER", help="where to write (default: here)")
    parser.add_argument("--svg", action="store_true", help="write SVG rather than PNG")
    parser.add_argument("--layer", type=int, default=-1, metavar="N", help="layer of pca (default: the last one)")
    parser.add_argument("--label", metavar="KEY", help="key of the metadata by which pca is coloured")
    arguments.add_json_option(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from vllm_tap.store.dataset import open_dataset
    from vllm_tap.viz import plots

    dataset = open_dataset(options.dataset)
    for name in options.plots:
        if name not in plots.PLOTS:
            raise SpecError(f"there is no picture {name!r}.{nearest(name, plots.PLOTS)}")
    if not options.to.is_dir():
        raise SpecError(f"{options.to} is not a folder: create it first.", path=str(options.to))
    written = {}
    for name in options.plots or plots.available(dataset):
        path = options.to / f"{name}.{'svg' if options.svg else 'png'}"
        plots.save(plots.PLOTS[name](dataset, layer=options.layer, label=options.label), path)
        written[name] = str(path)
        if not options.json:
            print(f"{name}: {path}")
    if options.json:
        print(json.dumps({"dataset": dataset.path, "files": written}))
    return 0
