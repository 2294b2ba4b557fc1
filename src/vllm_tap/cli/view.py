"""`vllm-tap view`: a page of HTML that shows samples of a dataset. Runs in the user's process."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_tap.cli import arguments
from vllm_tap.errors import SpecError


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "view",
        help="write a page that shows samples of a dataset",
        description="Write one page of HTML, which needs no network: pick a sample, point at a token, see norms, "
        "experts and a logit lens by layer.",
    )
    parser.add_argument("dataset", metavar="DATASET", help="folder of a dataset, or a URL that fsspec knows")
    parser.add_argument("--to", type=Path, default=Path("view.html"), metavar="FILE", help="default: view.html")
    parser.add_argument("--samples", type=arguments.positive, default=16, metavar="N", help="the first N (default 16)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="for the text of tokens; else ids are shown")
    parser.add_argument(
        "--lens",
        metavar="MODEL",
        help="folder of the model: what each layer would say next, and the text of tokens; transformers loads it",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    from vllm_tap.store.dataset import open_dataset
    from vllm_tap.viz import page
    from vllm_tap.viz.lens import lens_of

    dataset = open_dataset(options.dataset)
    tokenizer = options.tokenizer or options.lens
    text_of = _texts(tokenizer) if tokenizer else None
    lens = lens_of(options.lens) if options.lens else None
    page.write(page.page(dataset, range(min(options.samples, len(dataset))), text_of, lens), options.to)
    print(options.to)
    return 0


def _texts(folder: str) -> Callable[[int], str]:
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (ImportError, OSError, ValueError) as error:
        raise SpecError(f"the tokenizer of {folder} cannot be loaded: {error}", path=folder) from error
    return lambda token: str(tokenizer.decode([token]))
