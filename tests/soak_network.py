"""Rows over a network whose connections are reset: `python tests/soak_network.py --rows 200000 --seed 0`.

Connections for rows break by RST after random numbers of bytes, and now and then all connections do, the session among
them. A batch whose session breaks raises, and is asked for again over a new one. Each row says which it is and has
bytes that only that row has: none may be wrong, missing or there twice, and the worker's memory is free at the end.
"""

from __future__ import annotations

import argparse
import random
import time

import numpy as np

from proxy import NEVER, Proxy
from transports import connect, serve
from vllm_tap.errors import TransportError
from vllm_tap.transport.segment.pool import SegmentPool

MIB = 1 << 20
WIDTH = 512
"""64-bit numbers of a row."""
BLOCK_ROWS = 300
BATCH = 6


def rows_of(begin: int, end: int) -> np.ndarray:
    """Return rows [end - begin, WIDTH] of uint64: of each number and column another value; the number comes first."""
    numbers = np.arange(begin, end, dtype=np.uint64)[:, None]
    rows = (numbers * np.uint64(WIDTH) + np.arange(WIDTH, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
    rows[:, :1] = numbers
    return rows


class Soak:
    """A worker, a proxy before it, and a reader that is made anew where its session breaks."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.pool = SegmentPool(256 * MIB, shared=False)
        self.server = serve("tcp", self.pool)
        self.is_whole = True
        self.proxy = Proxy(self.server.address, self._break_after)
        self.num_sessions = 0
        self._connect()

    def _break_after(self, number: int) -> int:
        return NEVER if self.is_whole else self.chance.randrange(200, 12 * MIB)

    def _connect(self) -> None:
        self.is_whole = True  # the session's own connection
        self.reader = connect(self.proxy.address)
        self.is_whole = False
        self.num_sessions += 1

    def batch(self, begins: list[int], end: int) -> np.ndarray:
        """Return the rows of blocks, as the client has them."""
        while True:
            blocks = []
            for begin in begins:
                rows = rows_of(begin, min(begin + BLOCK_ROWS, end))
                blocks.append(self.pool.reserve(rows.nbytes))
                self.pool.view(blocks[-1])[:] = rows.data.cast("B")
            try:
                self.server.publish(self.reader.client, [block.block_id for block in blocks])
            except TransportError:
                for block in blocks:  # which nobody has: they are the publisher's to free
                    self.pool.release(block.block_id)
                self._connect()
                continue
            if self.chance.random() < 0.2:
                self.proxy.reset()
            try:
                held = self.reader.hold(blocks)
            except TransportError:
                self.reader.close()
                self._connect()
                continue
            found = [held.lease(index).array.view(np.uint64).reshape(-1, WIDTH) for index in range(len(blocks))]
            return np.concatenate(found)

    def close(self) -> None:
        """See that nothing is held, and end everything."""
        self.reader.close()
        deadline = time.monotonic() + 10
        while self.pool.stats().num_blocks:
            assert time.monotonic() < deadline, f"{self.pool.stats().num_blocks} blocks are still taken"
            time.sleep(0.01)
        self.server.close()
        self.proxy.close()


def main() -> None:
    """Run it, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    soak, seen, begin = Soak(options.seed), np.zeros(options.rows, np.uint8), time.monotonic()
    for first in range(0, options.rows, BATCH * BLOCK_ROWS):
        last = min(first + BATCH * BLOCK_ROWS, options.rows)
        rows = soak.batch(list(range(first, last, BLOCK_ROWS)), last)
        np.add.at(seen, rows[:, 0].astype(np.int64), 1)
        assert np.array_equal(rows, rows_of(first, last)), f"rows {first} to {last} are not what was published"
    assert (seen == 1).all(), f"{(seen == 0).sum()} rows are missing, {(seen > 1).sum()} came more than once"
    soak.close()
    mebibytes, seconds = rows_of(0, 1).nbytes * options.rows >> 20, time.monotonic() - begin
    print(f"{options.rows} rows, {mebibytes} MiB, in {seconds:.0f} s: all right, and once each")
    print(f"reset: {soak.proxy.num_broken} connections for rows, {soak.num_sessions - 1} sessions")


if __name__ == "__main__":
    main()
