"""The engines of an `AsyncLLM`, and which one runs a captured request. Client process, in its event loop."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_tap.client.connection import Connection
from vllm_tap.client.lives import Lives


class Engines:
    """Engines with captures of their own: several where they are data parallel.

    vLLM spreads requests over data parallel engines. Those that are captured are spread here, as their capture is to
    begin in the engine that runs them; vLLM counts them where it spreads the others.

    Args:
        connections: To the workers of engines, by their numbers.
        **options: As `Lives` takes them.

    Attributes:
        lives: Captures of each engine.
    """

    def __init__(self, connections: Mapping[int, Connection], **options: Any) -> None:
        self.lives = [Lives(connection, engine=number, **options) for number, connection in connections.items()]
        # Other processes have requests of their own, and begin elsewhere.
        self._turns = itertools.count(random.randrange(len(self.lives)))

    @property
    def connection(self) -> Connection:
        """One of the connections: all engines run one model."""
        return self.lives[0].connection

    def least_busy(self, among: Sequence[Lives] = ()) -> Lives:
        """Return the one with the fewest captured requests, of some or of all; in turn where they have as many."""
        turn, among = next(self._turns), among or self.lives
        return min((*among[turn % len(among) :], *among), key=lambda one: one.num_requests)

    async def idle(self) -> None:
        """Wait until captures that are to end have ended."""
        await asyncio.gather(*(one.idle() for one in self.lives))
