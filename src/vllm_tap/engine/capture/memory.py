"""The memory for rows of a worker: for each owner a pool of segments that it has to itself. Worker process.

An owner is a client that has connected, a capture whose rows go through calls, or the calls of the former interface.
Segments of a pool are handed to its owner alone, so no client can map, and by that read, the rows of another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable
from typing import Final

from vllm_tap.engine.capture.idle import PoolKeeper
from vllm_tap.engine.capture.interfaces import Backend
from vllm_tap.errors import TransportError
from vllm_tap.transport import threads
from vllm_tap.transport.segment.pool import PoolStats, SegmentPool

PATIENCE_SECONDS: Final = 2.0
"""Seconds that the segments of an owner that is gone wait for a pause of the engine; see `PoolKeeper`."""

POLL_SECONDS: Final = 0.05


class Pools:
    """The pools of a worker, by their owners; each is kept for its owner's next capture for a while."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._pools: dict[Hashable, tuple[SegmentPool, PoolKeeper]] = {}

    def add(self, owner: Hashable, *, shared: bool) -> SegmentPool:
        """Return a new pool without segments, which the owner may map if it is shared."""
        pool = self._backend.new_pool(shared)
        with self._lock:
            self._pools[owner] = pool, PoolKeeper([pool], self._backend.is_quiet)
        return pool

    def add_client(self, number: int) -> SegmentPool:
        """Return a new pool for a client that has connected."""
        return self.add(number, shared=True)

    def of(self, owner: Hashable) -> SegmentPool:
        """Return the pool of an owner.

        Raises:
            TransportError: It has none, or none any more.
        """
        return self._find(owner)[0]

    def _find(self, owner: Hashable) -> tuple[SegmentPool, PoolKeeper]:
        with self._lock:
            if owner not in self._pools:
                raise TransportError(f"there is no memory of {owner!r} here: its owner is gone, or has let go of it.")
            return self._pools[owner]

    def keep(self, owner: Hashable) -> None:
        """A capture of the owner begins: no segment goes."""
        self._find(owner)[1].keep()

    def linger(self, owner: Hashable) -> None:
        """A capture of the owner ends: after the last one, segments without rows go some time later."""
        with self._lock:
            _, keeper = self._pools.get(owner, (None, None))
        if keeper is not None:
            keeper.linger()

    def drop(self, owner: Hashable) -> None:
        """Give up the pool of an owner that is gone, if it has one: in a pause of the engine, or soon in any case."""
        with self._lock:
            pool, _ = self._pools.pop(owner, (None, None))
        if pool is not None:
            ending = threading.Event()
            try:
                threads.start("vllm-tap-drop", self._close, pool, ending, stop=ending.set)
            except RuntimeError:  # no more threads here
                pool.close()

    def _close(self, pool: SegmentPool, ending: threading.Event) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self._backend.is_quiet() and time.monotonic() < deadline and not ending.wait(POLL_SECONDS):
            pass
        pool.close()

    def stats(self) -> list[PoolStats]:
        """Return what each pool holds now."""
        with self._lock:
            pools = [pool for pool, _ in self._pools.values()]
        return [pool.stats() for pool in pools]

    @property
    def spilled_bytes(self) -> int:
        """Bytes of the files that hold rows beyond the memory of captures."""
        with self._lock:
            pools = [pool for pool, _ in self._pools.values()]
        return sum(pool.area_bytes for pool in pools)

    def close(self) -> None:
        """Give up all of them, at once."""
        with self._lock:
            pools, self._pools = [pool for pool, _ in self._pools.values()], {}
        for pool in pools:
            pool.close()
