"""When the memory of the host goes in which rows were."""

from __future__ import annotations

import pytest

from vllm_tap.engine.capture.idle import POOL_LINGER_SECONDS, POOL_PATIENCE_SECONDS, PoolKeeper
from vllm_tap.transport.segment.pool import SegmentPool

MIB = 1 << 20


class Keeper(PoolKeeper):
    """A keeper whose thread is called by hand, and whose captures end at time 0."""

    threads = 0

    def _start(self) -> None:
        self.threads += 1


@pytest.fixture
def pools() -> dict[bool, SegmentPool]:
    """One pool of either kind, with three segments each."""
    pools = {shared: SegmentPool(8 * MIB, shared=shared, segment_bytes=2 * MIB) for shared in (False, True)}
    for pool in pools.values():
        for block in [pool.reserve(2 * MIB) for _ in range(3)]:
            pool.release(block.block_id)
    return pools


@pytest.fixture
def quiet() -> list[bool]:
    """What the device says of itself."""
    return [True]


@pytest.fixture
def keeper(pools: dict[bool, SegmentPool], quiet: list[bool], monkeypatch: pytest.MonkeyPatch) -> Keeper:
    """A keeper after a capture."""
    monkeypatch.setattr("vllm_tap.engine.capture.idle.time.monotonic", lambda: 0.0)
    keeper = Keeper(list(pools.values()), lambda: quiet[0])
    keeper.linger()
    return keeper


def num_segments(pools: dict[bool, SegmentPool]) -> list[int]:
    """Return how many segments the pools have."""
    return [pool.stats().segments for pool in pools.values()]


def test_segments_go_some_time_after_the_last_capture(keeper: Keeper, pools: dict[bool, SegmentPool]) -> None:
    """Not before; then the thread ends, and another begins after the next capture."""
    assert keeper.tidy(POOL_LINGER_SECONDS - 0.1)
    assert num_segments(pools) == [3, 3]
    assert not keeper.tidy(POOL_LINGER_SECONDS)
    assert num_segments(pools) == [0, 0]
    assert keeper.threads == 1
    keeper.keep()
    keeper.linger()
    assert keeper.threads == 2


def test_segments_stay_while_a_capture_is_under_way(keeper: Keeper, pools: dict[bool, SegmentPool]) -> None:
    """However long it takes; one thread looks after what comes later."""
    keeper.keep()
    assert keeper.tidy(10 * POOL_PATIENCE_SECONDS)
    assert num_segments(pools) == [3, 3]
    keeper.linger()
    assert not keeper.tidy(POOL_LINGER_SECONDS)
    assert keeper.threads == 1


@pytest.mark.parametrize("event", ["a capture begins", "a capture begins and ends", "the engine goes on"])
def test_what_is_still_there_stays_when_somebody_comes(
    keeper: Keeper, pools: dict[bool, SegmentPool], quiet: list[bool], monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    """Segments go one by one."""
    trim = SegmentPool.trim

    def meanwhile(pool: SegmentPool, most: int) -> int:
        if event == "the engine goes on":
            quiet[0] = False
        else:
            keeper.keep()
        if event == "a capture begins and ends":
            monkeypatch.setattr("vllm_tap.engine.capture.idle.time.monotonic", lambda: POOL_LINGER_SECONDS)
            keeper.linger()
        return trim(pool, most)

    monkeypatch.setattr(SegmentPool, "trim", meanwhile)
    assert keeper.tidy(POOL_LINGER_SECONDS)
    assert num_segments(pools) == [2, 3]


def test_segments_with_rows_that_somebody_holds_go_later(keeper: Keeper, pools: dict[bool, SegmentPool]) -> None:
    """When these are let go of, without another capture."""
    block = pools[True].reserve(MIB)
    assert keeper.tidy(POOL_LINGER_SECONDS)
    assert num_segments(pools) == [0, 1]
    pools[True].release(block.block_id)
    assert not keeper.tidy(POOL_LINGER_SECONDS + keeper.poll_seconds)
    assert num_segments(pools) == [0, 0]


def test_segments_go_in_a_pause_of_the_engine(
    keeper: Keeper, pools: dict[bool, SegmentPool], quiet: list[bool]
) -> None:
    """The driver waits for what is queued; an engine that never pauses is not spared for ever."""
    quiet[0] = False
    assert keeper.tidy(POOL_PATIENCE_SECONDS - 0.1)
    assert num_segments(pools) == [3, 3]
    assert not keeper.tidy(POOL_PATIENCE_SECONDS)
    assert num_segments(pools) == [0, 0]
