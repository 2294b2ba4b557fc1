"""The engine of a command: started behind a shield from Ctrl-C, ended with the command. Runs in the user's process."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from vllm_tap.cli import arguments
from vllm_tap.cli.interrupts import Interrupts
from vllm_tap.transport import NIXL
from vllm_tap.transport.tcp.settings import LISTEN_VARIABLE, NIXL_VARIABLE

LOOPBACK: Final = "127.0.0.1:0"
"""Address that workers listen on for the command alone: it gets their random secret through vLLM's own calls."""


@contextmanager
def engine(options: argparse.Namespace, interrupts: Interrupts, *, listens: bool = False, **more: Any) -> Iterator[Any]:
    """Start an engine with a command's options, and end it behind the block: at once, if that was interrupted.

    Args:
        options: Of the command.
        interrupts: Shield of the start from Ctrl-C.
        listens: Whether its workers listen on the loopback interface, unless the environment says where.
        more: Arguments of `vllm.LLM`.
    """
    from vllm_tap.vllm import launch

    with interrupts.starting(), _listening(listens, nixl=getattr(options, "transport", "") == NIXL):
        llm = launch.start(options.model, **{**arguments.engine_arguments(options), **more})
    try:
        yield llm
    finally:
        launch.stop(llm, at_once=interrupts.came)


@contextmanager
def _listening(listens: bool, *, nixl: bool) -> Iterator[None]:
    """Have workers that start in this block listen, if they are not told to by the environment already."""
    if not listens or os.environ.get(LISTEN_VARIABLE):
        yield
        return
    given = {LISTEN_VARIABLE: LOOPBACK, **({NIXL_VARIABLE: "1"} if nixl and NIXL_VARIABLE not in os.environ else {})}
    os.environ.update(given)
    try:
        yield
    finally:
        for name in given:
            del os.environ[name]
