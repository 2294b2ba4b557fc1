"""The pool of segments, against a plain model of what is taken."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vllm_tap.transport.segment.pool
from vllm_tap.errors import BudgetError, TransportError
from vllm_tap.transport.segment.memory import Segment
from vllm_tap.transport.segment.pool import Block, SegmentPool

MIB = 1 << 20
PAGE = 4096


@pytest.fixture
def pool():
    """A small pool that grows by 2 MiB, up to 8."""
    pool = SegmentPool(8 * MIB, shared=False, segment_bytes=2 * MIB)
    yield pool
    pool.close()


def spans(blocks: list[Block]) -> list[tuple[int, int, int]]:
    """Return (segment, first byte, end) of blocks in order."""
    return sorted((b.segment_id, b.offset, b.offset + b.nbytes) for b in blocks)


def held_up() -> tuple[threading.Event, threading.Event, Callable[[Segment], None]]:
    """Return an `on_create` that says that it has begun, and then waits: (has begun, may go on, it)."""
    started, go_on = threading.Event(), threading.Event()

    def hold(segment: Segment) -> None:
        started.set()
        assert go_on.wait(10)

    return started, go_on, hold


def assert_disjoint(blocks: list[Block]) -> None:
    ordered = spans(blocks)
    for (segment, _, end), (next_segment, start, _) in itertools.pairwise(ordered):
        assert segment != next_segment or end <= start


def test_memory_is_taken_when_the_first_block_is_reserved(pool):
    """An idle pool holds no memory; the first block brings one segment."""
    assert pool.stats()[:4] == (0, 0, 0, 0)
    pool.reserve(100)
    assert pool.stats() == (1, 2 * MIB, PAGE, 1, 8 * MIB)


def test_block_ids_start_at_one_and_are_never_used_again(pool):
    """A released number does not come back, so an old descriptor cannot mean a new block."""
    first = pool.reserve(10)
    assert pool.release(first.block_id)
    second = pool.reserve(10)
    assert (first.block_id, second.block_id) == (1, 2)
    assert second.offset == first.offset


def test_release_of_an_unknown_block_says_so(pool):
    """Releasing twice, or something that never was, returns False and changes nothing."""
    block = pool.reserve(10)
    assert pool.release(block.block_id)
    before = pool.stats()
    assert not pool.release(block.block_id)
    assert not pool.release(999)
    assert pool.stats() == before


@pytest.mark.parametrize("align", [1, 64, 4096, 8192, 65536, 1 << 20])
def test_offsets_are_multiples_of_the_alignment(pool, align):
    """Whatever lies before it, a block starts at a multiple of `align`, and never inside a page of another."""
    pool.reserve(1)
    for _ in range(3):
        block = pool.reserve(5000, align=align)
        assert block.offset % max(align, PAGE) == 0


@pytest.mark.parametrize(("nbytes", "align"), [(0, 4096), (-1, 4096), (1, 0), (1, 3), (1, -4096)])
def test_impossible_requests_are_refused(pool, nbytes, align):
    """A block of no bytes, or an alignment that is no power of two, is a mistake of the caller."""
    with pytest.raises(ValueError, match="power of two"):
        pool.reserve(nbytes, align=align)


def test_neighbours_become_one_run_again(pool):
    """Blocks released in any order leave a run that holds a block of the whole segment."""
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)):
        blocks = [pool.reserve(MIB // 2) for _ in range(4)]
        for index in order:
            pool.release(blocks[index].block_id)
        whole = pool.reserve(2 * MIB)
        assert pool.stats().segments == 1
        pool.release(whole.block_id)


def test_the_smallest_gap_that_fits_is_used(pool):
    """A small block leaves the large gap for a large one."""
    blocks = [pool.reserve(n * PAGE) for n in (8, 1, 2, 1)]
    pool.release(blocks[0].block_id)
    pool.release(blocks[2].block_id)
    assert pool.reserve(2 * PAGE).offset == blocks[2].offset
    assert pool.reserve(8 * PAGE).offset == blocks[0].offset


def test_a_block_longer_than_a_segment_gets_its_own(pool):
    """Growth follows the block where the block is longer than the usual segment."""
    block = pool.reserve(5 * MIB + 1)
    assert pool.segment(block.segment_id).nbytes == 6 * MIB


def test_the_last_segment_is_cut_to_the_budget():
    """A budget that is no multiple of the segment size can be used to its last page."""
    pool = SegmentPool(3 * MIB, shared=False, segment_bytes=2 * MIB)
    pool.reserve(2 * MIB)
    pool.reserve(MIB)
    assert pool.stats().capacity_bytes == 3 * MIB
    pool.close()


def test_a_full_pool_says_what_was_needed_and_frees_with_a_release(pool):
    """BudgetError carries the figures, nothing is taken by the attempt, and a release makes room."""
    blocks = [pool.reserve(2 * MIB) for _ in range(4)]
    with pytest.raises(BudgetError, match="budget_bytes") as caught:
        pool.reserve(PAGE + 1)
    assert caught.value.needed_bytes == 2 * PAGE
    assert caught.value.budget_bytes == caught.value.used_bytes == 8 * MIB
    assert pool.stats().num_blocks == 4
    pool.release(blocks[2].block_id)
    assert pool.reserve(PAGE + 1).segment_id == blocks[2].segment_id


def test_empty_segments_make_way_for_a_longer_block(pool):
    """Segments that are too short and empty are given up before a block is refused."""
    blocks = [pool.reserve(2 * MIB) for _ in range(4)]
    for block in blocks[1:]:
        pool.release(block.block_id)
    assert pool.segment(pool.reserve(6 * MIB).segment_id).nbytes == 6 * MIB
    assert pool.stats().capacity_bytes == 8 * MIB
    with pytest.raises(BudgetError):
        pool.reserve(PAGE)


def test_budget_moves_up_and_down(pool):
    """Raising makes room; lowering closes segments without blocks and keeps the others."""
    kept = pool.reserve(2 * MIB)
    emptied = [pool.reserve(2 * MIB) for _ in range(3)]
    pool.budget_bytes = 10 * MIB
    emptied.append(pool.reserve(2 * MIB))
    for block in emptied:
        pool.release(block.block_id)
    pool.budget_bytes = 5 * MIB
    assert pool.stats() == (2, 4 * MIB, 2 * MIB, 1, 5 * MIB)
    pool.budget_bytes = 0
    assert pool.stats() == (1, 2 * MIB, 2 * MIB, 1, 0)
    assert len(pool.view(kept)) == 2 * MIB
    pool.release(kept.block_id)
    pool.trim()
    assert pool.stats().capacity_bytes == 0


def test_segments_are_reused_until_trimmed():
    """Many captures through one segment create it once; trim closes it."""
    created, closed = [], []
    pool = SegmentPool(
        8 * MIB,
        shared=False,
        segment_bytes=2 * MIB,
        on_create=lambda s: created.append((s.segment_id, s.address)),
        on_close=lambda s: closed.append((s.segment_id, len(s.view))),
    )
    for _ in range(20):
        pool.release(pool.reserve(MIB).block_id)
    assert [segment_id for segment_id, _ in created] == [1]
    assert closed == []
    assert pool.trim() == 1
    assert closed == [(1, 2 * MIB)]
    assert pool.reserve(1).segment_id == 2
    pool.close()


def test_trimming_takes_the_youngest_without_blocks_as_many_as_are_asked_for():
    """So that a capture that begins meanwhile finds the others."""
    pool = SegmentPool(8 * MIB, shared=False, segment_bytes=2 * MIB)
    blocks = [pool.reserve(2 * MIB) for _ in range(4)]
    for block in blocks[:3]:
        pool.release(block.block_id)
    assert pool.trim(1) == 1
    assert list(pool._segments) == [1, 2, 4]
    assert [pool.trim(1), pool.trim(1), pool.trim(1)] == [1, 1, 0]
    assert list(pool._segments) == [4]
    pool.close()


def test_view_and_address_are_the_same_bytes(pool):
    """What is written through the view stands at the address, and blocks do not see each other's bytes."""
    first, second = pool.reserve(5000), pool.reserve(5000)
    pool.view(first)[:] = b"a" * 5000
    pool.view(second)[:] = b"b" * 5000
    segment = pool.segment(first.segment_id)
    assert pool.address(second) - segment.address == second.offset
    whole = np.frombuffer(segment.view, np.uint8)
    assert whole.ctypes.data == segment.address
    assert set(whole[first.offset : first.offset + 5000].tolist()) == {ord("a")}
    assert set(whole[second.offset : second.offset + 5000].tolist()) == {ord("b")}


def test_growing_ahead_leaves_nothing_to_do_for_reserve():
    """Blocks reserved while pages are being populated wait for that segment instead of making another."""
    started, go_on, hold = held_up()
    pool = SegmentPool(4 * MIB, shared=False, segment_bytes=2 * MIB, on_create=hold)
    pool.grow_ahead(3 * MIB)
    assert started.wait(10)
    assert pool.stats()[:2] == (2, 4 * MIB)
    blocks: list[Block] = []
    engine = threading.Thread(target=lambda: blocks.extend(pool.reserve(2 * MIB) for _ in range(2)))
    engine.start()
    go_on.set()
    engine.join()
    assert spans(blocks) == [(1, 0, 2 * MIB), (2, 0, 2 * MIB)]
    pool.close()


def test_growing_ahead_without_a_thread_leaves_it_to_the_next_block(monkeypatch):
    """A limit on threads: nothing waits for memory that nobody makes."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    pool = SegmentPool(4 * MIB, shared=False, segment_bytes=2 * MIB)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        pool.grow_ahead(4 * MIB)
    assert pool.stats()[:2] == (0, 0)
    assert spans([pool.reserve(MIB)]) == [(3, 0, MIB)]
    pool.close()


def test_growing_ahead_makes_room_for_the_largest_block():
    """Blocks larger than a usual segment find one that was made for them."""
    grown = []
    pool = SegmentPool(
        32 * MIB, shared=False, segment_bytes=2 * MIB, on_create=lambda _: grown.append(threading.current_thread().name)
    )
    pool.grow_ahead(9 * MIB, 3 * MIB)
    blocks = [pool.reserve(3 * MIB) for _ in range(3)]
    assert len({block.segment_id for block in blocks}) == 3
    assert set(grown) == {"vllm-tap-grow"}
    assert pool.stats().capacity_bytes == 12 * MIB
    pool.close()


def test_segments_are_as_large_as_what_came_before(monkeypatch):
    """Where nobody says how much is wanted, small captures need not wait for large segments; there is a most."""
    monkeypatch.setattr(vllm_tap.transport.segment.pool, "FIRST_SEGMENT_BYTES", 2 * MIB)
    sizes = []
    pool = SegmentPool(64 * MIB, shared=False, segment_bytes=8 * MIB, on_create=lambda s: sizes.append(s.nbytes // MIB))
    for _ in range(13):
        pool.reserve(2 * MIB)
    assert sizes == [2, 2, 4, 8, 8, 8]
    pool.close()


def test_growing_ahead_makes_no_more_than_is_wanted(monkeypatch):
    """Whole segments of the usual size, and one for the rest."""
    monkeypatch.setattr(vllm_tap.transport.segment.pool, "FIRST_SEGMENT_BYTES", 2 * MIB)
    pool = SegmentPool(64 * MIB, shared=False, segment_bytes=8 * MIB)
    pool.grow_ahead(19 * MIB)
    assert pool.stats()[:2] == (3, 20 * MIB)
    pool.close()


def test_a_pool_of_many_small_segments_grows_by_larger_ones(monkeypatch):
    """Each takes a file descriptor: captures whose rows are held are no reason to run out of them."""
    monkeypatch.setattr(vllm_tap.transport.segment.pool, "FIRST_SEGMENT_BYTES", 2 * MIB)
    pool = SegmentPool(128 * MIB, shared=False, segment_bytes=16 * MIB)
    for _ in range(50):
        pool.grow_ahead(2 * MIB, PAGE)
        pool.reserve(2 * MIB)
    assert pool.stats().segments < 25
    pool.close()


def test_what_was_to_be_made_ahead_is_not_when_the_budget_is_lowered():
    """As when a capture ends before its memory is there, and the next has a smaller budget."""
    started, go_on, hold = held_up()
    pool = SegmentPool(16 * MIB, shared=False, segment_bytes=2 * MIB, on_create=hold)
    pool.grow_ahead(16 * MIB)
    assert started.wait(10)
    pool.budget_bytes = 4 * MIB
    go_on.set()
    deadline = time.monotonic() + 10
    while pool.stats().capacity_bytes > 4 * MIB and time.monotonic() < deadline:
        time.sleep(0.01)
    assert pool.stats().capacity_bytes <= 4 * MIB
    pool.close()


def test_segments_are_made_two_at_a_time(monkeypatch):
    """The pages of one file come one after another, by whatever many threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    together = threading.Barrier(2)
    pool = SegmentPool(8 * MIB, shared=False, segment_bytes=2 * MIB, on_create=lambda _: together.wait(10) and None)
    pool.grow_ahead(8 * MIB)
    assert spans([pool.reserve(2 * MIB) for _ in range(4)]) == [(n, 0, 2 * MIB) for n in sorted(pool._segments)]
    pool.close()


def test_the_next_segment_is_made_while_there_is_room_in_the_last():
    """By a thread of its own, once, within the budget."""
    made = []
    pool = SegmentPool(
        4 * MIB, shared=False, segment_bytes=2 * MIB, on_create=lambda _: made.append(threading.current_thread().name)
    )
    for nbytes, num_segments in ((PAGE, 1), (MIB, 2), (MIB, 2), (MIB, 2)):
        pool.reserve(nbytes)
        pool.grow_more()
        pool.grow_more()
        assert pool.stats().segments == num_segments
    assert made == [threading.current_thread().name, "vllm-tap-grow"]
    pool.close()


def test_growing_ahead_counts_only_room_that_large_blocks_fit_into():
    """Segments of a capture of small blocks are no room for large ones; large segments are for small ones."""
    made = []
    pool = SegmentPool(
        64 * MIB, shared=False, segment_bytes=2 * MIB, on_create=lambda _: made.append(threading.current_thread().name)
    )

    def capture(nbytes: int, num_blocks: int) -> int:
        before = len(made)
        pool.grow_ahead(num_blocks * nbytes, nbytes)
        for block in [pool.reserve(nbytes) for _ in range(num_blocks)]:
            pool.release(block.block_id)
        return len(made) - before

    captures = [(MIB, 4), (5 * MIB, 3), (5 * MIB, 3), (MIB, 19), (4 * MIB, 3)]
    assert [capture(*blocks) for blocks in captures] == [2, 3, 0, 0, 0]
    assert set(made) == {"vllm-tap-grow"}
    pool.close()


def test_a_lower_budget_counts_where_a_segment_has_room(pool):
    """A segment that must stay for one block grants no more than the budget does."""
    kept = pool.reserve(PAGE)
    pool.budget_bytes = 4 * PAGE
    with pytest.raises(BudgetError, match="budget_bytes") as caught:
        pool.reserve(4 * PAGE)
    assert (caught.value.needed_bytes, caught.value.used_bytes) == (4 * PAGE, PAGE)
    pool.reserve(3 * PAGE)
    pool.release(kept.block_id)
    pool.reserve(PAGE)


def test_growing_ahead_stays_within_the_budget(pool):
    """Asking for more than the budget populates what the budget allows."""
    pool.grow_ahead(100 * MIB)
    assert pool.stats().capacity_bytes == 8 * MIB
    pool.reserve(PAGE)
    pool.grow_ahead(100 * MIB)
    assert pool.stats().capacity_bytes == 8 * MIB


def test_what_could_not_be_had_ahead_is_asked_for_when_it_is_needed():
    """A failure in the background is no failure of the capture: the reserve that finds no room tries itself, and fails
    for its own reason."""
    failures = [OSError(errno.ENOMEM, f"cannot pin, {when}") for when in ("needed", "ahead")]

    def pin(segment: Segment) -> None:
        if failures:
            raise failures.pop()

    pool = SegmentPool(4 * MIB, shared=False, segment_bytes=2 * MIB, on_create=pin)
    pool.grow_ahead(MIB)
    with pytest.raises(OSError, match="cannot pin, needed"):
        pool.reserve(MIB)
    assert pool.stats().capacity_bytes == 0
    assert pool.reserve(MIB).segment_id == 3
    pool.close()


def test_a_closed_pool_refuses(pool):
    """After close nothing is reserved, and everything that was is gone."""
    pool.reserve(10)
    pool.close()
    assert pool.stats()[:4] == (0, 0, 0, 0)
    with pytest.raises(TransportError, match="closed"):
        pool.reserve(10)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 3 * MIB), st.sampled_from([64, 4096, 65536]), st.integers(0, 30)), max_size=60)
)
def test_blocks_never_overlap_and_nothing_leaks(steps):
    """Any sequence of reserve and release keeps blocks apart, within their segment, and ends with an empty pool."""
    pool = SegmentPool(8 * MIB, shared=False, segment_bytes=2 * MIB)
    held: list[Block] = []
    for nbytes, align, victim in steps:
        try:
            block = pool.reserve(nbytes, align=align)
        except BudgetError:
            pass
        else:
            assert block.offset % align == 0
            assert block.offset + nbytes <= pool.segment(block.segment_id).nbytes
            held.append(block)
        if held and victim % 3 == 0:
            assert pool.release(held.pop(victim % len(held)).block_id)
        assert_disjoint(held)
        stats = pool.stats()
        assert stats.used_bytes == sum(-(-b.nbytes // PAGE) * PAGE for b in held)
        assert stats.capacity_bytes <= stats.budget_bytes
        assert stats.num_blocks == len(held)
    for block in held:
        assert pool.release(block.block_id)
    assert pool.stats().used_bytes == 0
    assert pool.reserve(8 * MIB).nbytes == 8 * MIB
    pool.close()


def test_threads_get_disjoint_blocks():
    """Reserving and releasing from several threads at once keeps what each wrote."""
    pool = SegmentPool(16 * MIB, shared=False, segment_bytes=2 * MIB)
    wrong: list[int] = []

    def work(mark: int) -> None:
        for turn in range(200):
            block = pool.reserve(1 + turn * 37 % 9000)
            view = pool.view(block)
            view[:] = bytes([mark]) * block.nbytes
            if bytes(view) != bytes([mark]) * block.nbytes:
                wrong.append(mark)
            del view
            pool.release(block.block_id)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert pool.stats().used_bytes == 0
    pool.close()


def test_each_capture_has_a_budget_of_its_own() -> None:
    """One that has used its own up is refused, with its numbers; another takes all of its own."""
    pool = SegmentPool(0, shared=False, segment_bytes=2 * MIB)
    poor, rich = pool.open_account(2 * MIB), pool.open_account(6 * MIB)
    poor.reserve(MIB)
    with pytest.raises(BudgetError, match=f"{MIB} of budget_bytes={2 * MIB} are in use") as raised:
        poor.reserve(2 * MIB)
    assert (raised.value.budget_bytes, raised.value.used_bytes) == (2 * MIB, MIB)
    for _ in range(6):
        rich.reserve(MIB)
    poor.reserve(MIB)
    for account in (poor, rich):
        with pytest.raises(BudgetError):
            account.reserve(1)
    assert pool.stats().used_bytes == pool.stats().budget_bytes == 8 * MIB
    pool.close()


def test_what_ended_captures_hold_counts_against_those_that_begin_later() -> None:
    """Not against one that was under way when they ended; until it is let go of."""
    pool = SegmentPool(0, shared=False, segment_bytes=2 * MIB)
    first, beside = pool.open_account(4 * MIB), pool.open_account(4 * MIB)
    held = [first.reserve(MIB) for _ in range(3)]
    first.close()
    later = pool.open_account(4 * MIB)
    later.reserve(MIB)
    with pytest.raises(BudgetError):
        later.reserve(1)
    for _ in range(4):
        beside.reserve(MIB)
    pool.release(held[0].block_id)
    later.reserve(MIB)
    with pytest.raises(BudgetError):
        later.reserve(1)
    pool.close()


def test_segments_stay_when_a_capture_ends_and_go_when_the_next_may_have_less() -> None:
    """Fresh pages are dear: the next capture finds those of the one before."""
    pool = SegmentPool(0, shared=False, segment_bytes=2 * MIB)
    account = pool.open_account(8 * MIB)
    for block in [account.reserve(2 * MIB) for _ in range(4)]:
        pool.release(block.block_id)
    account.close()
    assert pool.stats().capacity_bytes == 8 * MIB
    pool.open_account(4 * MIB)
    assert pool.stats().capacity_bytes == 4 * MIB
    pool.close()
