"""`vllm-tap serve`: vLLM's OpenAI-compatible server with routes of rows. Becomes that server's process."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from vllm_tap.cli.checks import PLUGIN
from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.vllm import launch


def add_command(commands: Any) -> None:
    """Add the command to a parser's subcommands."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="run vLLM's server, with rows over HTTP",
        description="Run vLLM's OpenAI-compatible server, whose replies may have rows: see docs/serving.md. All "
        "further arguments are those of vllm serve.",
    )
    parser.add_argument("model", metavar="MODEL", help="folder or name of a model")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="arguments of vllm serve")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command."""
    if launch.find_vllm() is None:
        raise EngineUnsupportedError(f"vLLM is not installed: {launch.INSTALL}")
    os.environ.update(environment(os.environ))
    command = [sys.executable, "-m", launch.COMMAND, "serve", options.model, *options.arguments]
    sys.stdout.flush()
    os.execv(sys.executable, command)  # this process becomes the server


def environment(given: Any) -> dict[str, str]:
    """Return the variables that the server needs beside those that are given.

    vLLM loads endpoint plugins only where VLLM_PLUGINS names them; set, it keeps all others from being loaded.
    """
    named = [name for name in given.get("VLLM_PLUGINS", "").split(",") if name]
    others = [] if "VLLM_PLUGINS" in given else launch.plugin_names()
    return {"VLLM_PLUGINS": ",".join(dict.fromkeys([*named, *others, PLUGIN]))}
