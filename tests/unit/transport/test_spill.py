"""Blocks that are moved from memory to files, and read by a client as any others. Both ends in this process."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vllm_tap.errors import BudgetError, DescriptorError
from vllm_tap.transport.segment.mapping import Mapping
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer
from vllm_tap.transport.segment.spill import SpillArea

MIB = 1 << 20
PERIOD = 192
"""A layout that repeats after so many bytes, which is no power of two."""


class Worker:
    """A pool of 2 MiB, and who hands its segments out."""

    def __init__(self) -> None:
        self.pool = SegmentPool(2 * MIB, segment_bytes=2 * MIB)
        self.server = SegmentServer(lambda number: self.pool)

    def put(self, nbytes: int, seed: int) -> Block:
        """Fill a block with bytes that follow from a number."""
        block = self.pool.reserve(nbytes)
        self.pool.view(block)[:] = content(seed, nbytes).tobytes()
        return block

    def close(self) -> None:
        """End both."""
        self.server.close()
        self.pool.close()


def content(seed: int, nbytes: int) -> np.ndarray:
    """Return the bytes of a block."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@pytest.fixture
def worker() -> Iterator[Worker]:
    """A worker."""
    worker = Worker()
    yield worker
    worker.close()


def test_many_times_the_memory_is_read_back_bit_for_bit(worker: Worker, tmp_path: Path) -> None:
    """Through mappings that are the client's own; memory and files stay within their bounds, and go with the leases."""
    reader = SegmentReader(worker.server.address)
    area = SpillArea(worker.pool, str(tmp_path), 64 * MIB)
    sizes = [MIB, MIB // 2 + 1, 3 * MIB // 4 + 100] * 16
    blocks = []
    for seed, nbytes in enumerate(sizes):
        block = worker.put(nbytes, seed)
        moved = area.move(block, PERIOD)
        assert (moved.offset - block.offset) % PERIOD == 0
        assert worker.pool.stats().used_bytes == 0
        assert worker.pool.stats().capacity_bytes <= 2 * MIB
        blocks.append(moved)
    assert sum(sizes) <= worker.pool.area_bytes <= 64 * MIB
    assert list(tmp_path.iterdir()) == []
    assert area.seconds > 0
    in_memory = worker.put(MIB, 1000)
    worker.server.publish(reader.client, [block.block_id for block in (*blocks, in_memory)])
    held = reader.hold([*blocks, in_memory])
    for number, (seed, nbytes) in enumerate([*enumerate(sizes), (1000, MIB)]):
        array = held.lease(number).array
        np.testing.assert_array_equal(array, content(seed, nbytes))
        array[:] = 0  # a copy of this process's own
    area.close()
    for seed, block in enumerate(blocks):
        assert bytes(worker.pool.view(block)) == content(seed, block.nbytes).tobytes()
    del held, array
    reader.close()
    wait_until_free(worker)


def wait_until_free(worker: Worker) -> None:
    """Wait until nothing is held."""
    for _ in range(1 << 20):
        if not worker.pool._areas and not worker.pool.stats().num_blocks:
            return
        os.sched_yield()
    raise AssertionError(f"{worker.pool.area_bytes} bytes of files are left")


def test_the_files_of_a_client_that_is_gone_are_freed(worker: Worker, tmp_path: Path) -> None:
    """As its memory is."""
    reader = SegmentReader(worker.server.address)
    area = SpillArea(worker.pool, str(tmp_path), 64 * MIB)
    blocks = [area.move(worker.put(MIB, seed), PERIOD) for seed in range(40)]
    worker.server.publish(reader.client, [block.block_id for block in blocks])
    area.close()
    reader.close()
    wait_until_free(worker)


def test_files_take_no_more_than_they_may(worker: Worker, tmp_path: Path) -> None:
    """The block that does not fit stays where it is; what is released makes room again."""
    area = SpillArea(worker.pool, str(tmp_path), 5 * MIB)
    blocks = [area.move(worker.put(MIB, seed), PERIOD) for seed in range(4)]
    last = worker.put(MIB, 9)
    with pytest.raises(BudgetError, match=f"spilled rows fill {5 * MIB} bytes of files in {tmp_path}") as caught:
        area.move(last, PERIOD)
    assert caught.value.budget_bytes == 5 * MIB
    assert bytes(worker.pool.view(last)) == content(9, MIB).tobytes()
    assert worker.pool.area_bytes <= 5 * MIB
    worker.pool.release(blocks.pop(1).block_id)
    blocks.append(area.move(last, PERIOD))
    for seed, block in zip((0, 2, 3, 9), blocks, strict=True):
        assert bytes(worker.pool.view(block)) == content(seed, MIB).tobytes()


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_disk_says_so(worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Whichever call meets it; the rows in memory are untouched."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    area = SpillArea(worker.pool, str(tmp_path), 64 * MIB)
    block = worker.put(MIB, 1)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(BudgetError, match="No space left on device"):
        area.move(block, PERIOD)
    monkeypatch.undo()
    assert worker.pool.area_bytes <= 16 * MIB
    assert bytes(worker.pool.view(area.move(block, PERIOD))) == content(1, MIB).tobytes()


def test_a_folder_that_is_gone_says_so(worker: Worker, tmp_path: Path) -> None:
    """With its name."""
    area = SpillArea(worker.pool, str(tmp_path / "gone"), 64 * MIB)
    with pytest.raises(BudgetError, match=r"gone, which was refused .*No such file") as caught:
        area.move(worker.put(MIB, 1), PERIOD)
    assert caught.value.path == str(tmp_path / "gone")


def test_a_client_refuses_a_file_that_others_can_open(tmp_path: Path) -> None:
    """It could be cut, and reading it would end the process; so could one that is shorter than was said."""
    path = tmp_path / "named"
    path.write_bytes(bytes(8192))
    with path.open("rb") as file, pytest.raises(DescriptorError, match="1 names"):
        Mapping(file.fileno(), 1, 8192, is_file=True)
    with tempfile.TemporaryFile(dir=tmp_path) as file:
        file.write(bytes(4096))
        file.flush()
        with pytest.raises(DescriptorError, match="has 4096 bytes, and the worker said 8192"):
            Mapping(file.fileno(), 1, 8192, is_file=True)
        with pytest.raises(DescriptorError, match="seals"):
            Mapping(file.fileno(), 1, 4096)


def test_a_block_can_be_shortened(worker: Worker) -> None:
    """Its end is free at once, and counted as such."""
    account = worker.pool.open_account(2 * MIB)
    block = account.reserve(2 * MIB)
    with pytest.raises(BudgetError):
        account.reserve(1)
    left = worker.pool.shorten(block, 5000)
    assert (left.nbytes, account.used_bytes) == (5000, 8192)
    other = account.reserve(2 * MIB - 8192)
    assert other.offset >= left.offset + 8192
    for each in (left, other):
        assert worker.pool.release(each.block_id)
    assert account.used_bytes == worker.pool.stats().used_bytes == 0
