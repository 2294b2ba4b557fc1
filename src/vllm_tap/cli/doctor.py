"""`vllm-tap doctor`: what a capture needs and whether it is here. Runs in the user's process."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from typing import Any

from vllm_tap.cli import arguments
from vllm_tap.cli.checks import NO, OK, Finding, all_findings
from vllm_tap.cli.engine import engine
from vllm_tap.cli.interrupts import Interrupts
from vllm_tap.cli.table import columns, layer_text, print_json
from vllm_tap.errors import TapError
from vllm_tap.streams import SOURCES

_WIDTH = 13
_INDENT = _WIDTH + 8


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="say whether captures work here",
        description="Say whether captures work here, and what to do where they do not. With MODEL, start it (without "
        "compilation) and say what can be captured from it. Exit code 1 when captures cannot work.",
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or name of a model")
    arguments.add_json_option(parser)
    arguments.add_engine_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    report = Report(options.json)
    for finding in all_findings():
        report.add(finding)
    what = f"captures from {options.model}" if options.model else "captures"
    if options.model and report.works:
        _examine(options, report)
    elif options.model:
        report.add(Finding(NO, "engine", f"{options.model} was not started: see above"))
    report.end(
        f"{what} can work here" if report.works else f"{what} cannot work here: see the lines that begin with no"
    )
    return 0 if report.works else 1


class Report:
    """Findings: shown as they come, or as one JSON object at the end."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._findings: list[Finding] = []
        self._streams: list[tuple[str, ...]] = []

    @property
    def works(self) -> bool:
        """True if no finding keeps captures from working."""
        return all(finding.level != NO for finding in self._findings)

    def add(self, finding: Finding) -> None:
        """Take a line."""
        self._findings.append(finding)
        if not self._as_json:
            show(finding)
            sys.stdout.flush()  # the engine writes to the same terminal

    def add_streams(self, hellos: list[Any]) -> None:
        """Take the streams that a model has."""
        self._streams = stream_rows(hellos)
        if not self._as_json:
            print(columns(self._streams, right=(2,)))

    def end(self, verdict: str) -> None:
        """Say what it comes to."""
        if not self._as_json:
            print(verdict)
            return
        names, *rows = self._streams or [()]
        print_json(
            works=self.works,
            findings=[finding._asdict() for finding in self._findings],
            streams=[dict(zip(names, row, strict=True)) for row in rows],
        )


def show(finding: Finding) -> None:
    """Print one line of the report; in a terminal, what does not fit goes on below it."""
    text = finding.text
    if sys.stdout.isatty():
        width = max(shutil.get_terminal_size().columns, 2 * _INDENT) - _INDENT
        text = ("\n" + " " * _INDENT).join(textwrap.wrap(text, width, break_on_hyphens=False))
    print(f"{finding.level:4s}  {finding.subject:{_WIDTH}s}  {text}")


def _examine(options: argparse.Namespace, report: Report) -> None:
    """Start an engine and say what can be captured from it."""
    from vllm_tap.client.connection import connect

    try:
        with Interrupts(keeps=False) as interrupts, engine(options, interrupts, enforce_eager=True) as llm:
            hellos = connect(llm).hellos
    except TapError as error:
        report.add(Finding(NO, "engine", str(error)))
        return
    for finding in engine_findings(hellos):
        report.add(finding)
    report.add_streams(hellos)


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


def stream_rows(hellos: list[Any]) -> list[tuple[str, ...]]:
    """Return a table of the streams over all ranks: layers, dtype, width, where the rows come from."""
    merged: dict[tuple[str, str, int], set[int]] = {}
    for hello in hellos:
        for info in hello.streams:
            merged.setdefault((info.name, info.dtype, info.width), set()).update(info.layers)
    said = {info.name: info.convention for hello in hellos for info in hello.streams if info.name not in SOURCES}
    said |= {"hidden_states": next((hello.residual for hello in hellos if hello.residual), "")}
    rows: list[tuple[str, ...]] = [("stream", "dtype", "width", "layers", "convention")]
    for (name, dtype, width), layers in merged.items():
        rows.append((name, dtype, str(width), layer_text(sorted(layers)), said.get(name, "")))
    return rows
