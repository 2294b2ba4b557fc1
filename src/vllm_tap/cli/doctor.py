"""`vllm-tap doctor`: what a capture needs and whether it is here. Runs in the user's process."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vllm_tap.cli import arguments
from vllm_tap.cli.checks import NO, OK, Finding, all_findings
from vllm_tap.cli.table import columns, layer_text
from vllm_tap.errors import TapError

_WIDTH = 13


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="say whether captures work here",
        description="Say whether captures work here, and what to do where they do not. With MODEL, start it (without "
        "compilation) and say what can be captured from it. Exit code 1 when captures cannot work.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or name of a model")
    arguments.add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    findings = []
    for finding in all_findings():
        findings.append(finding)
        show(finding)
    works = all(finding.level != NO for finding in findings)
    if options.model and works:
        return _examine(options)
    if options.model:
        show(Finding(NO, "engine", f"{options.model} was not started: see above"))
    print("captures can work here" if works else "captures cannot work here: see the lines that begin with no")
    return 0 if works else 1


def show(finding: Finding) -> None:
    """Print one line of the report."""
    print(f"{finding.level:4s}  {finding.subject:{_WIDTH}s}  {finding.text}")


def _examine(options: argparse.Namespace) -> int:
    """Start an engine and say what can be captured from it."""
    from vllm_tap.client.connection import connect
    from vllm_tap.vllm import launch

    sys.stdout.flush()  # the engine writes to the same terminal
    llm = None
    try:
        llm = launch.start(options.model, **{**arguments.engine_arguments(options), "enforce_eager": True})
        hellos = connect(llm).hellos
    except TapError as error:
        show(Finding(NO, "engine", str(error)))
        print(f"captures from {options.model} cannot work: see the line above")
        return 1
    finally:
        if llm is not None:
            launch.stop(llm)
    for finding in engine_findings(hellos):
        show(finding)
    print(stream_table(hellos))
    print(f"captures from {options.model} can work here")
    return 0


def engine_findings(hellos: list[Any]) -> list[Finding]:
    """Return what the workers of an engine say of themselves, and which streams they cannot give.

    Args:
        hellos: `messages.Hello` of every rank.
    """
    first = hellos[0]
    num_ranks = f"{len(hellos)} rank{'' if len(hellos) == 1 else 's'}"
    layers = f"{max(hello.num_layers for hello in hellos)} decoder layers"
    found = [
        Finding(OK, "engine", f"vLLM {first.engine}, {first.runner} runner, {first.device}, {num_ranks}, {layers}")
    ]
    missing = {stream: reason for hello in hellos for stream, reason in hello.reasons.items()}
    return found + [Finding("warn", stream, reason) for stream, reason in missing.items()]


def stream_table(hellos: list[Any]) -> str:
    """Return a table of the streams over all ranks: layers, dtype, width, where the rows come from."""
    merged: dict[tuple[str, str, int], set[int]] = {}
    for hello in hellos:
        for info in hello.streams:
            merged.setdefault((info.name, info.dtype, info.width), set()).update(info.layers)
    residual = next((hello.residual for hello in hellos if hello.residual), "")
    rows = [("stream", "dtype", "width", "layers", "convention")]
    for (name, dtype, width), layers in merged.items():
        rows.append((name, dtype, str(width), layer_text(sorted(layers)), residual if name == "hidden_states" else ""))
    return columns(rows, right=(2,))
