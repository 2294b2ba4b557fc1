"""The command `vllm-tap`. Runs in the user's process; all but `doctor` without a model start an engine beside it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from vllm_tap import __version__
from vllm_tap.cli import capture, doctor, inspect, plot, record, verify, view
from vllm_tap.cli.arguments import join_negative
from vllm_tap.errors import TapError

INTERRUPTED = 130

ENGINE_LOG = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}
"""What vLLM logs unless the user says otherwise: by default it would mix with the tables on standard output."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 for a reported error, 2 for wrong usage, 130 for Ctrl-C."""
    for name, value in ENGINE_LOG.items():
        os.environ.setdefault(name, value)
    options = _parser().parse_args(join_negative(sys.argv[1:] if argv is None else argv))
    try:
        return int(options.run(options))
    except TapError as error:
        print(f"vllm-tap: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("vllm-tap: interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllm-tap", description="Hidden states, router logits and routed experts out of a stock vLLM engine."
    )
    parser.add_argument("--version", action="version", version=f"vllm-tap {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    capture.add_command(commands)
    record.add_command(commands)
    inspect.add_command(commands)
    plot.add_command(commands)
    view.add_command(commands)
    doctor.add_command(commands)
    verify.add_command(commands)
    return parser
