"""The engines of an `AsyncLLM`, and which one runs a captured request. Client process, in its event loop."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm_tap.client.connection import Connection
from vllm_tap.client.lives import Lives
from vllm_tap.vllm import asynchronous

PENALTY_S: Final = 30.0
"""Seconds for which an engine that could not capture a request comes last: it would always have the fewest requests."""


class Engines:
    """Engines with captures of their own: several where they are data parallel.

    vLLM spreads requests over data parallel engines. Those that are captured are spread here, as their capture is to
    begin in the engine that runs them; vLLM counts them where it spreads the others.

    Args:
        llm: The `AsyncLLM`.
        connections: To the workers of engines, by their numbers.
        **options: As `Lives` takes them.
    """

    def __init__(self, llm: Any, connections: Mapping[int, Connection], **options: Any) -> None:
        self._llm = llm
        self._lives = [Lives(connection, engine=number, **options) for number, connection in connections.items()]
        # Other processes have requests of their own, and begin elsewhere.
        self._turns = itertools.count(random.randrange(len(self._lives)))

    @property
    def connection(self) -> Connection:
        """One of the connections: all engines run one model."""
        return self.lives[0].connection

    @property
    def lives(self) -> list[Lives]:
        """Captures of each engine that there still is: vLLM may have let go of some."""
        num_engines = asynchronous.num_engines(self._llm)
        return [one for one in self._lives if one.engine < num_engines] or self._lives

    def least_busy(self, among: Sequence[Lives] = ()) -> Lives:
        """Return the one with the fewest captured requests, of some or of all; in turn where they have as many.

        One that could not capture a request comes last for a while.
        """
        turn, among, since = next(self._turns), among or self.lives, time.monotonic() - PENALTY_S
        in_turn = (*among[turn % len(among) :], *among)
        return min(in_turn, key=lambda one: (one.failed > since, one.num_requests))

    async def idle(self) -> None:
        """Wait until captures that are to end have ended."""
        await asyncio.gather(*(one.idle() for one in self._lives))
