"""Whose memory rows lie in: a pool for each owner, which nobody else gets, and which goes with it."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from vllm_tap.engine.capture.cpu import CpuBackend
from vllm_tap.engine.capture.memory import Pools
from vllm_tap.errors import DescriptorError, TransportError
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer

MIB = 1 << 20
SECRET = os.urandom(4096)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as a condition holds; the test's own limit of time ends it otherwise."""
    while not condition():
        os.sched_yield()


@pytest.mark.timeout(60)
def test_a_client_maps_its_own_segments_and_no_others() -> None:
    """Also one that has the same number, and when memory of a client that is gone might be used again."""
    pools = Pools(CpuBackend())
    server = SegmentServer(pools.add_client)
    server.on_disconnect = pools.drop
    one, two = SegmentReader(server.address), SegmentReader(server.address)
    assert one.pool_id != two.pool_id
    account = pools.of(one.client).open_account(MIB)
    block = account.reserve(len(SECRET))
    account.pool.view(block)[:] = SECRET
    server.publish(one.client, [block.block_id])
    lease = one.lease(block)
    assert lease.array.tobytes() == SECRET
    for number in range(1, 5):
        with pytest.raises(DescriptorError, match="it has no such segment"):
            two.segment_array(number)
    del lease
    one.close()
    with pytest.raises(TransportError, match="its owner is gone"):
        wait_until(lambda: pools.of(one.client) is None)
    mine = pools.of(two.client).open_account(MIB).reserve(len(SECRET))
    assert SECRET not in two.segment_array(mine.segment_id).tobytes()
    two.close()
    server.close()
    pools.close()


def test_an_owner_that_is_gone_leaves_no_memory() -> None:
    """Neither to hand out nor in use."""
    pools = Pools(CpuBackend())
    pool = pools.add("capture", shared=False)
    pool.open_account(MIB).reserve(1)
    assert [stats.num_blocks for stats in pools.stats()] == [1]
    pools.drop("capture")
    pools.drop("capture")
    pools.linger("capture")
    assert pools.stats() == []
    with pytest.raises(TransportError, match="there is no memory of 'capture' here"):
        pools.keep("capture")
    wait_until(lambda: pool.stats().segments == 0)
