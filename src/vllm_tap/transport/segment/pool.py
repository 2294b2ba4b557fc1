"""The memory in which the worker keeps captured rows: segments that are reused, cut into blocks, within a budget.

Runs in the engine worker: the engine's thread reserves, the thread of the socket releases.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from vllm_tap.errors import BudgetError, TransportError
from vllm_tap.transport import threads
from vllm_tap.transport.segment.extents import FreeExtents
from vllm_tap.transport.segment.memory import PAGE_BYTES, Segment, round_up

logger = logging.getLogger("vllm_tap")

DEFAULT_SEGMENT_BYTES = 256 << 20
SEGMENT_GRANULE_BYTES = 2 << 20
FIRST_SEGMENT_BYTES = 16 << 20
"""A pool grows by no less than this, if the budget has as much: small captures need not wait for large segments."""
BLOCK_ALIGN_BYTES = max(4096, PAGE_BYTES)
"""No page has bytes of two blocks: a client that writes into its copy of a page touches one block alone."""
MOST_AT_ONCE = 2
"""Segments that are made at the same time: the pages of one file are listed under one lock, by whatever many threads.
14 GiB took 3.8 s one after the other with 16 threads, 2.0 s two at a time with 4 each, 1.5 s four at a time; beside an
engine that computes, captures of such a size took as long with two as with more (16 cores, one H200)."""

_CLOSED = "the worker's pool of segments is closed: start another capture."


class Block(NamedTuple):
    """Place of a run of rows.

    Attributes:
        segment_id: number of the segment.
        offset: first byte in the segment.
        nbytes: length, as it was asked for.
        block_id: unique in the life of the pool, from 1, never used again.
    """

    segment_id: int
    offset: int
    nbytes: int
    block_id: int


class PoolStats(NamedTuple):
    """Contents of a pool: `used_bytes` counts whole pages, `capacity_bytes` counts segments under way too."""

    segments: int
    capacity_bytes: int
    used_bytes: int
    num_blocks: int
    budget_bytes: int


class Account:
    """One capture's share of a pool, and what it has taken; other captures have accounts of their own.

    The blocks that captures which have ended still hold when it is opened count against it: they are the client's.

    Attributes:
        pool: The pool that it is of.
        budget_bytes: The most that its blocks may take together.
    """

    def __init__(self, pool: SegmentPool, budget_bytes: int) -> None:
        self.pool, self.budget_bytes = pool, budget_bytes
        self._footprints: dict[int, int] = {}
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        """Bytes of its blocks, in whole pages."""
        return self._used_bytes

    @property
    def block_ids(self) -> Collection[int]:
        """Its blocks."""
        return self._footprints.keys()

    @property
    def spare_bytes(self) -> int:
        """Bytes that it may still take."""
        return max(self.budget_bytes - self._used_bytes, 0)

    def reserve(self, nbytes: int) -> Block:
        """Set a block aside, as `SegmentPool.reserve` does.

        Raises:
            BudgetError: The block does not fit, in this account or in the pool.
            TransportError: The pool is closed, or the system refused the memory.
        """
        return self.pool.reserve(nbytes, account=self)

    def close(self) -> None:
        """Take no more blocks; those that are there stay until they are released."""
        self.pool.close_account(self)

    def add(self, block_id: int, footprint: int) -> None:
        """Count a block; the pool's lock is held."""
        self._footprints[block_id] = footprint
        self._used_bytes += footprint

    def shorten(self, block_id: int, footprint: int) -> None:
        """Count less of a block, if it is counted; the pool's lock is held."""
        if block_id in self._footprints:
            self._used_bytes -= self._footprints[block_id] - footprint
            self._footprints[block_id] = footprint

    def discard(self, block_id: int) -> None:
        """Count a block no more, if it was; the pool's lock is held."""
        self._used_bytes -= self._footprints.pop(block_id, 0)


class SegmentPool:
    """Segments of one client of a worker, cut into blocks.

    Fresh pages cost more than moving the rows into them, so segments stay until `trim`, a lower budget or `close`.
    Where nothing says how much is wanted, each is as large as all before it, up to `segment_bytes`.

    Args:
        budget_bytes: the most that all segments together may take, as long as no account is opened; from then on, what
            is in use and what the open accounts may still take.
        shared: whether clients may map the segments.
        segment_bytes: size of large segments, unless a block needs more or the budget has less.
        on_create: called with each new segment before its first use, in whichever thread made it.
        on_close: called with each segment before it is unmapped.
        create: makes a segment of a number and a size; by default one of memory.
    """

    def __init__(
        self,
        budget_bytes: int,
        *,
        shared: bool = True,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        on_create: Callable[[Segment], None] | None = None,
        on_close: Callable[[Segment], None] | None = None,
        create: Callable[[int, int], Segment] | None = None,
    ) -> None:
        self.pool_id = os.urandom(16)
        self.shared = shared
        self._budget_bytes = budget_bytes
        self._segment_bytes = round_up(segment_bytes, SEGMENT_GRANULE_BYTES)
        self._first_bytes = min(FIRST_SEGMENT_BYTES, self._segment_bytes)
        self._on_create, self._on_close = on_create, on_close
        self._create = create or functools.partial(Segment.create, shared=shared)
        self._close_listeners: list[Callable[[Segment], None]] = []
        self._areas: list[SegmentPool] = []
        self._changed = threading.Condition()
        self._segments: dict[int, Segment] = {}
        self._blocks: dict[int, Block] = {}
        self._accounts: list[Account] = []
        self._kept: set[int] = set()  # blocks of accounts that are closed
        self._free = FreeExtents()
        self._capacity_bytes = 0
        self._pending: dict[int, int] = {}  # segment id -> bytes, while a thread populates it
        self._closed = False
        self._segment_ids = itertools.count(1)
        self._block_ids = itertools.count(1)

    def open_area(self, budget_bytes: int, create: Callable[[int, int], Segment], segment_bytes: int) -> SegmentPool:
        """Return a pool of segments of another kind, whose blocks are found and released here, beside those of memory.

        A segment of it that has no block is closed at once. It goes with `close_area`, or with this pool.
        """
        area = SegmentPool(
            budget_bytes, shared=self.shared, segment_bytes=segment_bytes, on_close=self._tell_closed, create=create
        )
        area._segment_ids, area._block_ids = self._segment_ids, self._block_ids
        self._areas.append(area)
        return area

    def close_area(self, area: SegmentPool) -> None:
        """Take no more blocks in an area; it is forgotten when the last one is released."""
        area.budget_bytes = 0
        self._forget_areas()

    def _forget_areas(self) -> None:
        for area in tuple(self._areas):
            if not area.budget_bytes and not area.stats().segments:
                with contextlib.suppress(ValueError):  # another thread was faster
                    self._areas.remove(area)

    @property
    def area_bytes(self) -> int:
        """Bytes of the segments of its areas."""
        return sum(area.stats().capacity_bytes for area in tuple(self._areas))

    @property
    def budget_bytes(self) -> int:
        """The most that all segments together may take; lowering it closes segments without blocks."""
        return self._budget_bytes

    @budget_bytes.setter
    def budget_bytes(self, budget_bytes: int) -> None:
        with self._changed:
            self._budget_bytes = budget_bytes
            excess = self._take_out_empty(down_to=budget_bytes)
        self._close_segments(excess)

    def open_account(self, budget_bytes: int) -> Account:
        """Return an account for a capture; segments without blocks that are beyond all budgets are closed."""
        account = Account(self, budget_bytes)
        with self._changed:
            for block_id in self._kept:
                account.add(block_id, _footprint(self._blocks[block_id].nbytes))
            self._accounts.append(account)
            self._budget_bytes = self._granted_bytes()
            excess = self._take_out_empty(down_to=self._budget_bytes)
        self._close_segments(excess)
        return account

    def close_account(self, account: Account) -> None:
        """Have an account take no more blocks; segments stay for the next one."""
        with self._changed:
            if account in self._accounts:
                self._accounts.remove(account)
                self._kept.update(account.block_ids)

    def _granted_bytes(self) -> int:
        """Return what is in use and what the open accounts may still take; the lock is held."""
        return self._used_bytes() + sum(account.spare_bytes for account in self._accounts)

    def reserve(self, nbytes: int, *, align: int = BLOCK_ALIGN_BYTES, account: Account | None = None) -> Block:
        """Set a block aside; it stays until `release`.

        Args:
            nbytes: length of the block.
            align: power of two that the offset in the segment is a multiple of; at least a page is used.
            account: the one that it counts against, if any.

        Raises:
            BudgetError: the block does not fit; `needed_bytes`, `budget_bytes` and `used_bytes` say by how much.
            TransportError: the pool is closed, or the system refused the memory.

        Cost:
            Microseconds where a free run is long enough; else the wait for a segment, see `grow_ahead`.
        """
        if nbytes < 1 or align < 1 or align & (align - 1):
            raise ValueError(f"a block needs nbytes >= 1 and a power of two for align, got {nbytes} and {align}")
        footprint = _footprint(nbytes)
        while True:
            with self._changed:
                _require_granted(footprint, account)
                # A segment from before the budget was lowered may have room that the budget no longer grants.
                granted = self._used_bytes() + footprint <= self._budget_bytes
                place = self._find(footprint, max(align, BLOCK_ALIGN_BYTES)) if granted else None
                if place is not None:
                    block = Block(*place, nbytes, next(self._block_ids))
                    self._blocks[block.block_id] = block
                    if account is not None:
                        account.add(block.block_id, footprint)
                    return block
                dropped = self._make_room(footprint)
                planned = self._plan(min(max(self._usual_bytes(), _whole(footprint)), self._spare_bytes()))
            self._close_segments(dropped)
            self._grow(*planned)

    def _find(self, footprint: int, align: int) -> tuple[int, int] | None:
        """Return a place for a block, waiting for segments under way, or None where the pool has to grow."""
        while True:
            if self._closed:
                raise TransportError(_CLOSED)
            place = self._free.take(footprint, align)
            if place is not None:
                return place
            if not self._pending:
                break
            self._changed.wait()
        return None

    def _make_room(self, footprint: int) -> list[Segment]:
        """Take empty segments that are too short out of a full pool; raise where that would not be enough."""
        empty_bytes = sum(segment.nbytes for segment in self._empty())
        if self._spare_bytes() + empty_bytes < footprint:
            raise _does_not_fit(footprint, self._used_bytes(), self._budget_bytes)
        if self._spare_bytes() >= footprint:
            return []
        return self._take_out_empty(down_to=self._budget_bytes - footprint)

    def view(self, block: Block) -> memoryview:
        """Return the writable bytes of a block; they are the block's until it is released."""
        return self.segment(block.segment_id).view[block.offset : block.offset + block.nbytes]

    def address(self, block: Block) -> int:
        """Return where a block starts in this process."""
        return self.segment(block.segment_id).address + block.offset

    def block(self, block_id: int) -> Block:
        """Return a block by its number.

        Raises:
            TransportError: there is none, or none any more.
        """
        for pool in (self, *self._areas):
            block = pool._blocks.get(block_id)
            if block is not None:
                return block
        raise TransportError(f"there is no block {block_id} in this pool", block_id=block_id)

    def release(self, block_id: int) -> bool:
        """Free a block; return False if there is none of that number."""
        return self._release(block_id) or any(self._release_in(area, block_id) for area in tuple(self._areas))

    def _release_in(self, area: SegmentPool, block_id: int) -> bool:
        if not area.release(block_id):
            return False
        area.trim()
        self._forget_areas()
        return True

    def _release(self, block_id: int) -> bool:
        with self._changed:
            block = self._blocks.pop(block_id, None)
            if block is None:
                return False
            self._free.add(block.segment_id, block.offset, _footprint(block.nbytes))
            self._kept.discard(block_id)
            for account in self._accounts:
                account.discard(block_id)
            if self._accounts:
                self._budget_bytes = max(self._budget_bytes, self._granted_bytes())
            return True

    def shorten(self, block: Block, nbytes: int) -> Block:
        """Free the end of a block that nobody else knows of yet; return what is left of it, of at least one byte."""
        left = block._replace(nbytes=min(max(nbytes, 1), block.nbytes))
        before, after = _footprint(block.nbytes), _footprint(left.nbytes)
        with self._changed:
            if self._blocks.get(block.block_id) != block:
                raise TransportError(f"there is no {block} in this pool", block_id=block.block_id)
            self._blocks[block.block_id] = left
            if after < before:
                self._free.add(block.segment_id, block.offset + after, before - after)
            for account in self._accounts:
                account.shorten(block.block_id, after)
        return left

    def grow_ahead(self, nbytes: int, largest: int = 0) -> None:
        """Have threads of its own see to it that `nbytes` are free, as far as the budget allows.

        They make several segments if the bytes are many, so that the first blocks need not wait for the last page; each
        at least as large as the `largest` block that is expected. Only free runs that hold such blocks count. What
        cannot be had ahead, the next `reserve` that finds no room asks for itself.
        """
        with self._changed:
            plans: deque[tuple[int, int]] = deque()
            least = max(self._first_bytes, min(_whole(self._capacity_bytes // 8), self._segment_bytes), _whole(largest))
            free = self._free.room_for(_footprint(largest)) if largest else self._free.total_bytes
            missing = nbytes - free - sum(self._pending.values())
            while missing > 0 and not self._closed:
                size = min(max(min(_whole(missing), self._segment_bytes), least), self._spare_bytes())
                if size <= 0:
                    break
                plans.append(self._plan(size))
                missing -= size
        self._start_growing(plans)

    def grow_more(self) -> None:
        """Have the next segment made ahead, if little is left of the last: where nothing says how much is wanted."""
        with self._changed:
            usual = self._usual_bytes()
            size = min(usual, self._spare_bytes())
            has_enough = self._closed or self._free.total_bytes + sum(self._pending.values()) >= usual // 2
            plans = deque([self._plan(size)] if size > 0 and not has_enough else [])
        self._start_growing(plans)

    def _usual_bytes(self) -> int:
        return min(max(self._first_bytes, self._capacity_bytes), self._segment_bytes)

    def _start_growing(self, plans: deque[tuple[int, int]]) -> None:
        num_cores = len(os.sched_getaffinity(0))
        for started in range(min(len(plans), MOST_AT_ONCE, max(num_cores // 4, 1))):
            try:
                threads.start("vllm-tap-grow", self._grow_all, plans, stop=plans.clear)
            except RuntimeError as error:  # no more threads here
                logger.info("vllm-tap: memory cannot be prepared ahead: %s", error)
                if not started:
                    self._give_up(plans)
                break

    def _give_up(self, plans: Iterable[tuple[int, int]]) -> None:
        with self._changed:
            for segment_id, _ in plans:
                del self._pending[segment_id]
            self._changed.notify_all()

    def _grow_all(self, plans: deque[tuple[int, int]]) -> None:
        """Make segments until there are no more plans; other threads take from them too."""
        while True:
            try:
                segment_id, nbytes = plans.popleft()
            except IndexError:
                return
            if self._capacity_bytes + sum(self._pending.values()) > self._budget_bytes:  # it has been lowered
                self._give_up([(segment_id, nbytes)])
                continue
            try:
                self._grow(segment_id, nbytes)
            except Exception as error:
                logger.info("vllm-tap: %d bytes could not be prepared ahead: %s", nbytes, error)

    def _plan(self, nbytes: int) -> tuple[int, int]:
        segment_id = next(self._segment_ids)
        self._pending[segment_id] = nbytes
        return segment_id, nbytes

    def _grow(self, segment_id: int, nbytes: int) -> None:
        """Create a planned segment. The lock is not held: blocks can be released while pages are populated."""
        segment = None
        try:
            if self._closed:
                raise TransportError(_CLOSED)
            segment = self._create(segment_id, nbytes)
            if self._on_create:
                self._on_create(segment)
        except BaseException:
            if segment is not None:
                segment.close()
            segment = None
            raise
        finally:
            with self._changed:
                del self._pending[segment_id]
                if segment is not None:
                    self._segments[segment_id] = segment
                    self._capacity_bytes += nbytes
                    self._free.add(segment_id, 0, nbytes)
                self._changed.notify_all()

    def segment(self, segment_id: int) -> Segment:
        """Return a segment by its number.

        Raises:
            TransportError: there is none, or none any more.
        """
        for pool in (self, *self._areas):
            segment = pool._segments.get(segment_id)
            if segment is not None:
                return segment
        raise TransportError(f"there is no segment {segment_id} in this pool", segment_id=segment_id)

    def duplicate_fd(self, segment_id: int) -> tuple[int, int, bool] | None:
        """Return a file descriptor of a shared segment, for the caller to close, its size, and whether it is a file.

        None without one.
        """
        for pool in (self, *self._areas):
            with pool._changed:  # a segment that is being closed would leave its number to some other file
                segment = pool._segments.get(segment_id)
                if segment is not None and segment.fd is not None:
                    return os.dup(segment.fd), segment.nbytes, segment.is_file
        return None

    def add_close_listener(self, listener: Callable[[Segment], None]) -> None:
        """Have `listener` called with each segment before it is unmapped."""
        self._close_listeners.append(listener)

    def remove_close_listener(self, listener: Callable[[Segment], None]) -> None:
        """Take back `add_close_listener`."""
        with contextlib.suppress(ValueError):
            self._close_listeners.remove(listener)

    def stats(self) -> PoolStats:
        """Return what the pool holds now."""
        with self._changed:
            return PoolStats(
                segments=len(self._segments) + len(self._pending),
                capacity_bytes=self._capacity_bytes + sum(self._pending.values()),
                used_bytes=self._used_bytes(),
                num_blocks=len(self._blocks),
                budget_bytes=self._budget_bytes,
            )

    def trim(self, most: int = sys.maxsize) -> int:
        """Close segments that have no block, the youngest first; return how many."""
        with self._changed:
            empty = self._take_out_empty(down_to=0, most=most)
        self._close_segments(empty)
        return len(empty)

    def close(self) -> None:
        """Close all segments; what clients have mapped stays readable there."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending)
            segments = list(self._segments.values())
            self._segments.clear()
            self._blocks.clear()
            self._kept.clear()
            self._free = FreeExtents()
            self._capacity_bytes = 0
        self._close_segments(segments)
        for area in self._areas:
            area.close()

    def _spare_bytes(self) -> int:
        spare = self._budget_bytes - self._capacity_bytes - sum(self._pending.values())
        return spare // BLOCK_ALIGN_BYTES * BLOCK_ALIGN_BYTES

    def _used_bytes(self) -> int:
        return self._capacity_bytes - self._free.total_bytes

    def _empty(self) -> list[Segment]:
        return [s for s in self._segments.values() if self._free.is_free(s.segment_id, s.nbytes)]

    def _take_out_empty(self, *, down_to: int, most: int = sys.maxsize) -> list[Segment]:
        """Remove empty segments, the youngest first, until the capacity is at most `down_to`."""
        taken: list[Segment] = []
        for segment in self._empty()[::-1][:most]:
            if self._capacity_bytes + sum(self._pending.values()) <= down_to:
                break
            self._free.drop(segment.segment_id, segment.nbytes)
            del self._segments[segment.segment_id]
            self._capacity_bytes -= segment.nbytes
            taken.append(segment)
        return taken

    def _close_segments(self, segments: list[Segment]) -> None:
        """Unmap segments that are out of the pool; listeners may take their own locks, so ours is not held."""
        for segment in segments:
            if self._on_close is not None:
                self._on_close(segment)
            self._tell_closed(segment)
            segment.close()

    def _tell_closed(self, segment: Segment) -> None:
        for listener in self._close_listeners:
            listener(segment)


def _require_granted(footprint: int, account: Account | None) -> None:
    """Refuse a block for which an account has too little left."""
    if account is not None and account.spare_bytes < footprint:
        raise _does_not_fit(footprint, account.used_bytes, account.budget_bytes)


def _does_not_fit(footprint: int, used_bytes: int, budget_bytes: int) -> BudgetError:
    return BudgetError(
        f"a block of {footprint} bytes does not fit: {used_bytes} of budget_bytes={budget_bytes} are in use, and no "
        "gap of that length is left. Raise budget_bytes, capture fewer layers or positions, or let go of the tensors "
        "of earlier captures.",
        needed_bytes=footprint,
        budget_bytes=budget_bytes,
        used_bytes=used_bytes,
    )


def _footprint(nbytes: int) -> int:
    return round_up(nbytes, BLOCK_ALIGN_BYTES)


def _whole(nbytes: int) -> int:
    return round_up(nbytes, SEGMENT_GRANULE_BYTES)
