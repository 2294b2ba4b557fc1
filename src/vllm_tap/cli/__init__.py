"""The command `vllm-tap`. Runs in the user's process; all but `doctor` without a model start an engine beside it."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any

from vllm_tap import __version__
from vllm_tap.cli import capture, doctor, export, inspect, plot, record, serve, verify, view
from vllm_tap.cli.arguments import join_negative
from vllm_tap.cli.interrupts import EXIT_CODE, say
from vllm_tap.errors import TapError

ENGINE_LOG = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""Settings of vLLM's log unless the user sets them: by default it would mix with the tables on standard output."""

COMPLETES = "_ARGCOMPLETE"
"""Set by a shell that asks for completions, which has the package of that name; see docs/cli.md."""


def command() -> int:
    """Run the command of this process; interrupted, it ends without the seconds that libraries take to be unloaded."""
    code = main()
    if code == EXIT_CODE:
        sys.stdout.flush()
        os._exit(code)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for a reported error, 2 for wrong usage, 130 for Ctrl-C."""
    for name, value in ENGINE_LOG.items():
        os.environ.setdefault(name, value)
    parser = _parser()
    if COMPLETES in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(join_negative(sys.argv[1:] if argv is None else argv))
    try:
        return int(options.run(options))
    except TapError as error:
        print(f"vllm-tap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_CODE


class _Command(argparse.ArgumentParser):
    """The arguments of one command, which says itself what it does not know: argparse leaves that to `vllm-tap`."""

    def parse_known_args(self, *given: Any) -> Any:  # type: ignore[override]
        options, unknown = super().parse_known_args(*given)
        if unknown:
            name = next((argument for argument in unknown if argument.startswith("-")), "").partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, 1)
            hint = f"Did you mean {near[0]}? " if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}. {hint}`{self.prog} --help` lists all.")
        return options, unknown


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-tap", description="Hidden states, router logits and routed experts out of a stock vLLM engine."
    )
    parser.add_argument("--version", action="version", version=f"vllm-tap {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Command)
    capture.add_command(commands)
    record.add_command(commands)
    serve.add_command(commands)
    inspect.add_command(commands)
    export.add_command(commands)
    plot.add_command(commands)
    view.add_command(commands)
    doctor.add_command(commands)
    verify.add_command(commands)
    return parser
