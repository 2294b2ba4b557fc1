"""The client's side of a worker on a network: a session, and rows that are fetched into memory of this process.

Runs in the client process.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from vllm_tap import codec
from vllm_tap.codec.meter import Meter
from vllm_tap.errors import DescriptorError, SpecError, TransportError
from vllm_tap.transport.calls import Caller
from vllm_tap.transport.segment.pool import Block
from vllm_tap.transport.segment.reader import Lease, check_block, check_distinct, usable_ids
from vllm_tap.transport.tcp import access, address, frames
from vllm_tap.transport.tcp.access import Access, Credential
from vllm_tap.transport.tcp.fetching import Lanes, Piece
from vllm_tap.transport.tcp.stream import Stream
from vllm_tap.transport.wire import MAX_RELEASE_IDS


def caller(text: str, terms: Access) -> Caller:
    """Return what calls a worker on a network.

    Raises:
        TransportError: The worker cannot be reached, or does not let this client in.
    """
    where = address.parse(text)
    return Caller(text, lambda: access.connect(where, terms, access.CALLS))


def _codec(terms: Access, same_host: bool) -> tuple[Callable[[], str], Meter | None]:
    """Return what chooses codecs for rows, and what measures if that does."""
    name = terms.codec
    if name == "auto" and same_host:
        name = "raw"  # rows need not be small where no link is
    if name != "auto":
        codec.get(name)
        if not codec.installed(name):
            raise SpecError(f"codec {name!r} has no package here: pip install vllm-tap[codecs], or use raw.")
        return lambda: name, None
    meter = Meter(terms.num_connections, tuple(filter(codec.installed, codec.names())))
    return meter.choose, meter


def _memory(block: Block) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    try:
        return np.empty(block.nbytes, np.uint8)
    except (MemoryError, ValueError) as error:  # ValueError: more than an array can have
        raise DescriptorError(
            f"there is no memory here for the {block.nbytes} bytes of block {block.block_id}", block_id=block.block_id
        ) from error


class Fetched:
    """Blocks that were fetched together."""

    def __init__(self, leases: Sequence[Lease]) -> None:
        self._leases = leases

    def lease(self, index: int) -> Lease:
        """Return the bytes of the block at this index of the list."""
        return self._leases[index]


class NetworkReader:
    """Fetches what one worker publishes to this process; a block is free in the worker as soon as it is here.

    Args:
        text: Address of the worker.
        terms: How to connect.

    Attributes:
        client: The number by which the worker knows this reader.
        worker_pid: Process of the worker, on its host.
        pool_id: 16 random bytes that name the worker's pool.
        same_host: Whether the worker runs on this host.
        is_local: Whether it is reached by the loopback interface.
        connect: Opens a connection of this session, given its role.

    Raises:
        TransportError: The worker cannot be reached, or does not let this client in.
        SpecError: There is no such codec here.
    """

    def __init__(self, text: str, terms: Access) -> None:
        where = address.parse(text)
        self._session = access.connect(where, terms, access.SESSION)
        try:
            hello = frames.Hello.decode(self._session.recv_exactly(frames.HELLO.size))
        except (OSError, EOFError) as error:
            self._session.close()
            raise TransportError(f"the worker at {where} did not greet ({error}): see its log.") from error
        self.client, self.worker_pid, self.pool_id = hello.client, hello.pid, hello.pool_id
        self.same_host = hello.host_id == address.host_id()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        choose, self.meter = _codec(terms, self.same_host)
        self.is_local = where.is_loopback
        credential, session = Credential(hello.client, hello.token), self._session

        def connect(role: int) -> Stream:
            if not session.alive:
                raise TransportError(f"the worker at {where} has gone: start the engine again.")
            return access.connect(where, terms, role, credential)

        self.connect = connect
        self._lanes = Lanes(lambda: connect(access.ROWS), terms.num_connections, choose, self.meter)

    @property
    def alive(self) -> bool:
        """True while the session stands, as far as is known here; False after `close`."""
        return not self._closed and self._session.alive

    def fetch(self, pieces: Iterable[Piece]) -> None:
        """Bring bytes of published blocks into memory of this process; a connection that breaks is made anew.

        Raises:
            DescriptorError: The worker has not got one of them for this client.
            TransportError: The worker cannot be reached any more, or was silent for too long; the reader is closed.

        Cost:
            No copy in user space at either end without TLS and codec; as long as the network takes.
        """
        self._require_open()
        try:
            self._lanes.fetch(pieces)
        except DescriptorError:
            raise
        except TransportError:
            self.close()
            raise

    def release(self, block_ids: Sequence[int]) -> None:
        """Tell the worker that blocks are not wanted any more, without waiting for it."""
        if os.getpid() != self._pid:
            return  # a forked child: the blocks are the parent's
        numbers = list(block_ids)
        with self._lock, contextlib.suppress(OSError):  # a worker that is gone has freed them
            for begin in range(0, len(numbers), MAX_RELEASE_IDS):
                if not self._closed:
                    self._session.sendall(frames.encode_release(numbers[begin : begin + MAX_RELEASE_IDS]))

    def lease(self, block: Block) -> Lease:
        """Return the bytes of a published block, which is free in the worker afterwards.

        Returns:
            Lease whose array is uint8 [nbytes], CPU, in memory of this process.

        Raises:
            DescriptorError: No such block was published to this reader.
            TransportError: As for `fetch`.
        """
        return self.hold([block]).lease(0)

    def hold(self, blocks: Sequence[Block]) -> Fetched:
        """Fetch all blocks of a list, or none of them. They are free in the worker afterwards, also after an error.

        Raises:
            DescriptorError: As for `lease`, and for a block that comes twice.
            TransportError: As for `fetch`.
        """
        try:
            for block in blocks:
                check_block(block)
            check_distinct(blocks)
            leases = [Lease(block, _memory(block)) for block in blocks]
            self.fetch(Piece(lease.block.block_id, 0, lease.array.data) for lease in leases)
        finally:
            self.release(sorted(usable_ids(blocks)))
        return Fetched(leases)

    def close(self) -> None:
        """End the connections: the worker frees what was not fetched, and ends this client's captures."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if os.getpid() == self._pid:
                with contextlib.suppress(OSError):
                    self._session.shutdown()
        self._lanes.close()

    def _require_open(self) -> None:
        if os.getpid() != self._pid:
            raise TransportError(f"this reader belongs to process {self._pid}: connect again here.")
        if self._closed:
            raise TransportError("this reader is closed: connect again.")

    def __del__(self) -> None:
        session: Stream | None = getattr(self, "_session", None)
        if session is not None:
            session.close()
