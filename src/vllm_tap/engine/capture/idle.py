"""Keeps what captures need for those that follow soon, and lets it go in a thread of its own. Worker process."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Final

from vllm_tap.transport import threads
from vllm_tap.transport.segment.pool import SegmentPool

logger = logging.getLogger("vllm_tap")

POOL_LINGER_SECONDS: Final = 600.0
"""Seconds that segments stay which nobody uses. To make them again takes 0.1 s a GiB, and up to 0.5 where pages are new
to a virtual machine: a capture of 12.8 GB took 1.7 s, and 5.3 after its segments had gone (16 cores, one H200)."""

POOL_PATIENCE_SECONDS: Final = 3600.0
"""After this long they go, whether the device is quiet or not."""


class Keeper(ABC):
    """Memory that is kept from the end of a capture until it is wanted again or its time has come."""

    what: ClassVar[str]
    poll_seconds: ClassVar[float] = 1.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_users = 0
        self._idle_since: float | None = None
        self._has_thread = False
        self._ending = threading.Event()

    def keep(self) -> None:
        """A capture begins: nothing goes until its `linger`, and those of all others."""
        with self._lock:
            self._num_users += 1
            self._idle_since = None

    def linger(self) -> None:
        """A capture ends: if it was the last one, what it used goes after a while."""
        with self._lock:
            self._num_users = max(self._num_users - 1, 0)
            if self._num_users:
                return
            self._idle_since = time.monotonic()
            starts, self._has_thread = not self._has_thread, True
        if starts:
            self._start()

    def _start(self) -> None:
        try:
            threads.start("vllm-tap-keeper", self._run, stop=self._ending.set)
        except RuntimeError as error:  # no more threads here
            self._stay(error)

    def _stay(self, error: Exception) -> None:
        logger.warning("vllm-tap: %s is kept until after the next capture: giving it back failed: %s", self.what, error)
        with self._lock:
            self._has_thread = False

    def _run(self) -> None:
        try:
            self._begin()
            while self.tidy(time.monotonic()) and not self._ending.wait(self.poll_seconds):
                pass
        except Exception as error:
            self._stay(error)

    def _begin(self) -> None:  # noqa: B027
        """Do what a new thread needs; nothing, unless a keeper says otherwise."""

    def tidy(self, now: float) -> bool:
        """Let go what it is time for; return whether there is anything left to look after."""
        with self._lock:
            is_due = self._is_time(now)
        if is_due:
            self._let_go(now)
        with self._lock:
            self._has_thread = self._has_more()
            return self._has_thread

    def _is_time(self, now: float) -> bool:
        return self._idle_since is not None and self._is_due(now - self._idle_since)

    @abstractmethod
    def _is_due(self, idle_seconds: float) -> bool:
        """Tell whether it is time."""

    @abstractmethod
    def _let_go(self, now: float) -> None:
        """Let it go, unless a capture has begun meanwhile."""

    @abstractmethod
    def _has_more(self) -> bool:
        """Tell whether there is anything left to look after; the lock is held."""


class PoolKeeper(Keeper):
    """Keeps the segments of pools; of those that clients hold rows in, until they let go of these.

    Args:
        pools: The pools.
        is_quiet: Whether the device has nothing to do. The driver waits for all queued work before memory of the host
            is no longer pinned, and the engine may wait with it; so segments go in a pause of the engine.
    """

    what = "memory of the host"
    poll_seconds = 10.0

    def __init__(self, pools: Sequence[SegmentPool], is_quiet: Callable[[], bool]) -> None:
        super().__init__()
        self._pools, self._is_quiet = pools, is_quiet

    def _is_due(self, idle_seconds: float) -> bool:
        return idle_seconds >= POOL_PATIENCE_SECONDS or (idle_seconds >= POOL_LINGER_SECONDS and self._is_quiet())

    def _let_go(self, now: float) -> None:
        # One at a time: the engine may go on, or a capture begin that wants the others.
        for pool in self._pools:
            while self._is_time(now) and pool.trim(1):
                pass

    def _has_more(self) -> bool:
        return any(pool.stats().segments for pool in self._pools)
