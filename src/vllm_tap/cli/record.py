"""`vllm-tap record`: prompts from a file through an engine, rows into a dataset. Runs in the user's process."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from vllm_tap.cli import arguments, capture
from vllm_tap.cli.engine import engine
from vllm_tap.cli.inspect import print_facts
from vllm_tap.cli.interrupts import Interrupts
from vllm_tap.cli.prompts import read_prompts
from vllm_tap.cli.table import size_text
from vllm_tap.errors import DatasetError
from vllm_tap.store.source import AUTO, WRITERS
from vllm_tap.transport import NETWORKS

INTERRUPTED: Final = "interrupted: whole parts are in the dataset, and the same command with --resume goes on"


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "record",
        help="run prompts through a model and keep the rows in a dataset",
        description="Run prompts through a model, some at a time, and write hidden states (the default: of all "
        "layers) or other streams into a dataset. After a kill, the same command with --resume goes on.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or name of a model")
    parser.add_argument("dataset", metavar="DATASET", help="folder of the dataset, or a URL that fsspec knows")
    capture.add_prompts_option(parser)
    capture.add_spec_options(parser)
    group = capture.add_run_options(parser)
    group.add_argument("--resume", action="store_true", help="go on with a dataset that is there")
    group.add_argument(
        "--batch", type=arguments.positive, default=256, metavar="N", help="prompts of a part (default 256)"
    )
    group.add_argument(
        "--writers",
        choices=WRITERS,
        default=AUTO,
        help="who writes: this process, the workers, or workers where rows would cross a network (default)",
    )
    arguments.add_json_option(parser)
    arguments.add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command. What can be refused without an engine is refused before one starts."""
    spec = capture.spec_of(options)
    prompts = read_prompts(options.prompts)
    _require_free(options.dataset, options.resume)
    capture.require_plugin()
    capture.check_layers(spec, options)
    listens = options.transport in NETWORKS
    with Interrupts(keeps=False, says=INTERRUPTED) as interrupts, engine(options, interrupts, listens=listens) as llm:
        dataset = _record(llm, prompts, spec, options)
    print_facts(dataset, options.json)
    return 0


def _require_free(path: str, resume: bool) -> None:
    from vllm_tap.store.places import place_of

    if not resume and place_of(path).parts():
        raise DatasetError(f"{path} holds a dataset already: add --resume to go on with it, or name another folder.")


def _record(llm: Any, prompts: list[Any], spec: Any, options: argparse.Namespace) -> Any:
    from vllm_tap.client.record import record
    from vllm_tap.vllm.frontend import pools

    sampling = {} if pools(llm) else {"max_tokens": options.max_tokens, "temperature": 0}
    with capture.refusals_told(options.prompts):
        return record(
            llm,
            prompts,
            spec,
            options.dataset,
            resume=options.resume,
            batch=options.batch,
            on_part=_say,
            writers=options.writers,
            transport=options.transport,
            staging=options.staging,
            budget_bytes=options.budget_bytes,
            **sampling,
        )


def _say(part: Any) -> None:
    from tqdm import tqdm  # comes with vLLM

    last = part.first_sample + part.num_samples - 1
    size = size_text(sum(file.nbytes for file in part.files))
    # Above the bar of the next part, which may be there already.
    tqdm.write(f"samples {part.first_sample:,} to {last:,}: {part.num_rows:,} rows, {size}", file=sys.stderr)
