"""`vllm-tap capture`: prompts from a file through an engine, rows into a file. Runs in the user's process."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from vllm_tap.cli import arguments, checks
from vllm_tap.cli.engine import engine
from vllm_tap.cli.interrupts import EXIT_CODE, Interrupts, say
from vllm_tap.cli.prompts import read_prompts
from vllm_tap.cli.save import check_target, draft_of, finished, save
from vllm_tap.cli.table import print_json, size_text, summary, total_seconds
from vllm_tap.errors import PluginNotLoadedError, SpecError, TapError
from vllm_tap.spec import Spec, resolve_layers
from vllm_tap.streams import ABOUT, LAYERED_FIELDS, SINGLE_FIELDS
from vllm_tap.transport import AUTO, NETWORKS, TRANSPORTS

OTHER_FIELDS: Final = tuple(field for field in LAYERED_FIELDS + SINGLE_FIELDS if field != "hidden_states")
"""Fields of a `Spec` whose options have their names; `--layers` is that of hidden states."""


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "capture",
        help="run prompts through a model and capture",
        description="Run prompts through a model and capture hidden states (the default: of all layers) "
        "or other streams. Prints how much came and how long it took; --save keeps the rows.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or name of a model")
    add_prompts_option(parser)
    add_spec_options(parser)
    group = add_run_options(parser)
    group.add_argument("--save", type=Path, metavar="FILE", help="write the rows to this safetensors file")
    group.add_argument("--force", action="store_true", help="replace the file if it exists")
    arguments.add_json_option(parser)
    arguments.add_engine_options(parser)
    parser.set_defaults(run=run)


def add_prompts_option(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a file of prompts."""
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='.txt: a prompt a line; .jsonl: objects with "prompt", "messages" or "token_ids", '
        "other keys are ignored; empty lines too",
    )


def add_spec_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `spec_of` reads."""
    group = parser.add_argument_group("what to capture", "LAYERS is all, or numbers and ranges such as 0-8,-1.")
    layers: dict[str, Any] = {"type": arguments.layers, "metavar": "LAYERS"}
    group.add_argument(
        "--layers", **layers, help="hidden states after these decoder layers; all of them if no other stream is named"
    )
    for field in OTHER_FIELDS:
        kind = layers if field in LAYERED_FIELDS else {"action": "store_true"}
        group.add_argument(f"--{field.replace('_', '-')}", **kind, help=ABOUT[field])
    group.add_argument(
        "--positions",
        type=arguments.positions,
        default="all",
        metavar="WHICH",
        help="all (the default), prompt, generated, last (of the prompt), last_generated, prompt positions such as "
        '0,-1, or an expression in JSON such as {"prompt": [-8]}',
    )


def add_run_options(parser: argparse.ArgumentParser) -> Any:
    """Add options of a run; return their group."""
    group = parser.add_argument_group("how")
    group.add_argument(
        "--max-tokens",
        type=arguments.positive,
        default=1,
        metavar="N",
        help="tokens to generate for each prompt, greedily (default 1: rows of the prompt only)",
    )
    group.add_argument(
        "--transport",
        choices=TRANSPORTS,
        default=AUTO,
        help="shared memory, a network by TCP or NIXL, bytes through calls, or the first that works (default)",
    )
    group.add_argument(
        "--staging",
        choices=("auto", "staged", "direct"),
        default="auto",
        help="on a GPU: through device memory, or straight to pinned memory",
    )
    group.add_argument(
        "--budget-bytes",
        type=arguments.size,
        metavar="SIZE",
        help="most memory for rows, such as 4GiB (default: a quarter of RAM, at most 8 GiB)",
    )
    return group


def spec_of(options: argparse.Namespace) -> Spec:
    """Return the specification that the options describe: hidden states of all layers unless they name a stream."""
    others = {field: getattr(options, field) for field in OTHER_FIELDS}
    layers = options.layers if options.layers is not None or any(others.values()) else "all"
    return Spec(hidden_states=layers, positions=options.positions, **others)


def run(options: argparse.Namespace) -> int:
    """Run the command. What can be refused without an engine is refused before one starts."""
    spec = spec_of(options)
    if options.save:
        check_target(options.save, options.force)
    prompts = read_prompts(options.prompts)
    require_plugin()
    check_layers(spec, options)
    with Interrupts(keeps=bool(options.save)) as interrupts:
        try:
            with engine(options, interrupts, listens=options.transport in NETWORKS) as llm:
                result = _capture(llm, prompts, spec, options)
        except KeyboardInterrupt:
            say(f"interrupted: no sample was finished, {options.save} is not written")
            return EXIT_CODE
        # The rows outlive the engine, whose memory is free for writing the file.
        return _report(result, options, interrupts)


def _report(result: Any, options: argparse.Namespace, interrupts: Interrupts) -> int:
    """Save and say what came; return the exit code."""
    saved = ""
    if options.save:
        interrupts.at_end.append(lambda: draft_of(options.save).unlink(missing_ok=True))
        saved = f"saved {options.save} ({size_text(save(result, options.save, options.model))})"
    unfinished = len(result) - len(finished(result))
    if options.json:
        _print_json(result, options)
    elif not unfinished:
        print(summary(result), *filter(None, [saved]), sep="\n")
    if not unfinished:
        return 0
    of_all = f"{len(result) - unfinished:,} of {len(result):,} samples were finished"
    say(f"interrupted: {of_all}, {saved}")
    return EXIT_CODE


def _print_json(result: Any, options: argparse.Namespace) -> None:
    print_json(
        model=options.model,
        num_samples=len(result),
        num_finished=len(finished(result)),
        num_rows=result.num_rows,
        num_bytes=result.num_bytes,
        layers=result.layers,
        conventions=result.conventions,
        seconds=total_seconds(result),
        saved=str(options.save) if options.save else None,
    )


def check_layers(spec: Spec, options: argparse.Namespace) -> None:
    """Refuse layers that the model's configuration has not.

    Raises:
        LayerError: There is no such layer.
    """
    from vllm_tap.vllm import launch

    chosen = {name: layers for name in LAYERED_FIELDS if isinstance(layers := getattr(spec, name), tuple)}
    number = launch.count_layers(options.model, **arguments.engine_arguments(options)) if chosen else None
    for name, layers in chosen.items():
        if number is not None:
            resolve_layers(name, layers, list(range(number)), number)


def require_plugin() -> None:
    """Refuse an environment in which the engine would start without taps.

    Raises:
        PluginNotLoadedError: What keeps the plugin from being loaded.
    """
    for finding in (checks.vllm(), checks.plugin(), checks.plugin_list(), checks.switch()):
        if finding.level == checks.NO:
            raise PluginNotLoadedError(f"{finding.subject}: {finding.text}.")


def _capture(llm: Any, prompts: list[Any], spec: Spec, options: argparse.Namespace) -> Any:
    from vllm_tap.client.capture import capture
    from vllm_tap.vllm.frontend import pools

    sampling = {} if pools(llm) else {"max_tokens": options.max_tokens, "temperature": 0}
    with refusals_told(options.prompts):
        return capture(
            llm,
            prompts,
            spec,
            transport=options.transport,
            staging=options.staging,
            budget_bytes=options.budget_bytes,
            **sampling,
        )


@contextmanager
def refusals_told(path: Path) -> Iterator[None]:
    """Name the file in what is said of its prompts, and put vLLM's own refusals into a line."""
    try:
        yield
    except TapError as error:
        if "sample" in error.identity:
            error.args = (f"{path}: {error}",)
        raise
    except ValueError as error:
        raise SpecError(f"vLLM refused a prompt of {path}, or an option: {error}") from error
