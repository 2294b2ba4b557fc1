"""Transports of blocks by name, for tests that all of them pass: a server over a pool, and readers of it."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable

import numpy as np

from vllm_tap.transport.calls import CallServer
from vllm_tap.transport.nixl.reader import NixlReader
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer
from vllm_tap.transport.tcp.access import Access
from vllm_tap.transport.tcp.address import is_network
from vllm_tap.transport.tcp.reader import NetworkReader
from vllm_tap.transport.tcp.server import NetworkServer
from vllm_tap.transport.tcp.settings import Settings

NAMES = ["segment", "tcp"]
"""Those of every environment, and NIXL where that is installed: `make test-nixl`."""
if importlib.util.find_spec("nixl") is not None:
    NAMES.append("nixl")

MIB = 1 << 20
SECRET = b"a secret of the tests"
NIXL_MARK = "#nixl"
"""Behind an address: which reader `connect` makes of it."""

Server = SegmentServer | NetworkServer
Reader = SegmentReader | NetworkReader


def serve(name: str, pool: SegmentPool) -> Server:
    """Return a server of blocks of a pool, to all its clients."""
    if name == "segment":
        return SegmentServer(lambda _: pool)
    return _Network(pool, name)


class _Network(NetworkServer):
    def __init__(self, pool: SegmentPool, name: str) -> None:
        self._own_calls = CallServer(lambda data: data)
        given = Settings("127.0.0.1", 0, SECRET, is_random=False, tls=False, nixl=name == "nixl")
        super().__init__(given, lambda _: pool, self._own_calls, itertools.count(1))
        if name == "nixl":
            self.address += NIXL_MARK

    def close(self) -> None:
        super().close()
        self._own_calls.close()


def connect(address: str, timeout_s: float = 5.0) -> Reader:
    """Return a reader of what is served at an address."""
    if is_network(address):
        kind = NixlReader if address.endswith(NIXL_MARK) else NetworkReader
        return kind(address.removesuffix(NIXL_MARK), Access(SECRET, tls=False, timeout_s=timeout_s))
    return SegmentReader(address, timeout_s=timeout_s)


def keeps(reader: Reader) -> bool:
    """Tell whether a block is taken in the worker as long as an array over it lives; else it is free when read."""
    return isinstance(reader, SegmentReader)


class NetworkWorker:
    """A server of rows and calls in this process, on a network, with a pool for each client.

    Args:
        settings: How it listens.
        answer: What a call returns.
    """

    def __init__(self, settings: Settings, answer: Callable[[bytes], bytes]) -> None:
        self.pools: dict[int, SegmentPool] = {}
        self.calls = CallServer(answer)
        self.server = NetworkServer(settings, self._new_pool, self.calls, itertools.count(1))
        self.access = Access(settings.secret, tls=settings.tls)

    def _new_pool(self, number: int) -> SegmentPool:
        self.pools[number] = SegmentPool(64 * MIB, shared=False)
        return self.pools[number]

    def put(self, reader: NetworkReader, *sizes: int) -> tuple[list[Block], list[bytes]]:
        """Publish blocks of random bytes; return them and these."""
        pool = self.pools[reader.client]
        blocks = [pool.reserve(nbytes) for nbytes in sizes]
        for block in blocks:
            pool.view(block)[:] = np.random.default_rng(block.block_id).bytes(block.nbytes)
        self.server.publish(reader.client, [block.block_id for block in blocks])
        return blocks, [bytes(pool.view(block)) for block in blocks]

    def close(self) -> None:
        """End all."""
        self.server.close()
        self.calls.close()
        for pool in self.pools.values():
            pool.close()
