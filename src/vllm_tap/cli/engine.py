"""The engine of a command: started behind a shield from Ctrl-C, ended with the command. Runs in the user's process."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm_tap.cli import arguments
from vllm_tap.cli.interrupts import Interrupts


@contextmanager
def engine(options: argparse.Namespace, interrupts: Interrupts, **more: Any) -> Iterator[Any]:
    """Start an engine with a command's options, and end it behind the block: at once, if that was interrupted."""
    from vllm_tap.vllm import launch

    with interrupts.starting():
        llm = launch.start(options.model, **{**arguments.engine_arguments(options), **more})
    try:
        yield llm
    finally:
        launch.stop(llm, at_once=interrupts.came)
