"""Ways to the workers of an engine: a reader of rows and a caller for each, by memory or network. Client process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from vllm_tap.client.replies import LOST, greeted
from vllm_tap.errors import EngineDiedError, TransportError
from vllm_tap.frame import messages
from vllm_tap.transport import NETWORK, NETWORKS, NIXL, SEGMENT
from vllm_tap.transport.calls import Caller
from vllm_tap.transport.nixl.reader import NixlReader
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.tcp.access import Access, read_secret
from vllm_tap.transport.tcp.address import host_id, is_network
from vllm_tap.transport.tcp.reader import NetworkReader, caller


class Ways:
    """Sockets to workers, opened on first use.

    Args:
        access: Terms of workers on a network; by default those of VLLM_TAP_SECRET, or of a secret that a worker made.

    Attributes:
        hellos: What the workers said of themselves last, by rank.
    """

    def __init__(self, access: Access | None = None) -> None:
        self.hellos: Sequence[messages.Hello] = ()
        self._access = access
        self._connecting = threading.Lock()
        self._readers: dict[tuple[int, str], SegmentReader | NetworkReader] = {}
        self._callers: dict[tuple[int, str], Caller] = {}
        self._given: dict[int, str] = {}  # addresses by rank, where these were given
        self._host = host_id().hex()

    def greet_at(self, addresses: Sequence[str]) -> list[messages.Hello]:
        """Ask the workers at addresses what can be captured; they are reached there from now on."""
        callers = [self._caller_at(where) for where in addresses]
        hellos = greeted(callers)
        for hello, where, known in zip(hellos, addresses, callers, strict=True):
            rank = hello.rank.rank
            self._given[rank] = where
            self._callers[rank, _way_of(where)] = known
        return hellos

    def greet_again(self) -> list[messages.Hello]:
        """Ask the workers that have been asked at addresses, on a new connection where one was lost.

        Raises:
            TapError: As of `greet_at`.
        """
        for rank, where in self._given.items():
            if (rank, _way_of(where)) not in self._callers:
                self._callers[rank, _way_of(where)] = self._caller_at(where)
        return greeted([self._callers[rank, _way_of(where)] for rank, where in self._given.items()])

    def _caller_at(self, where: str) -> Caller:
        return caller(where, self._terms()) if is_network(where) else Caller(where)

    def reader(self, rank: int, way: str) -> SegmentReader | NetworkReader:
        """Return the reader of a worker, see `readers`."""
        return self._readers[rank, self._way(rank, way)]

    def callers(self, way: str) -> list[Caller]:
        """Return what reaches each worker.

        Raises:
            EngineDiedError: The connection over a network was lost before.
        """
        keys = [(rank, self._way(rank, way)) for rank in self._ranks()]
        if any(key not in self._callers for key in keys):
            raise EngineDiedError(LOST)
        return [self._callers[key] for key in keys]

    def readers(self, way: str = "auto") -> dict[int, SegmentReader | NetworkReader]:
        """Return a reader per rank, connecting on first use, also for calls.

        Raises:
            TransportError: Shared memory cannot be reached from here, or a worker on no network.
        """
        with self._connecting:
            for hello in self.hellos:
                key = hello.rank.rank, self._way(hello.rank.rank, way)
                if key not in self._readers:
                    reader, known = self._connect(hello, key[1])
                    self._readers[key], self._callers[key] = reader, self._callers.get(key) or known()
        return {rank: self.reader(rank, way) for rank in self._ranks()}

    def let_go_of_lost(self) -> set[str]:
        """Return the ways on which a worker was lost; over a network the connection alone may have ended."""
        lost = [key for key, reader in list(self._readers.items()) if not reader.alive]
        for key in lost:
            if key[1] in NETWORKS:  # the next capture makes another
                self._readers.pop(key).close()
                self._callers.pop(key).close()
        return {way for _, way in lost}

    def shares_memory(self, way: str) -> bool:
        """Tell whether rows of all workers are mapped."""
        return bool(way) and all(self._way(rank, way) == SEGMENT for rank in self._ranks())

    def goes_over_network(self, way: str) -> bool:
        """Tell whether calls may arrive later than requests that are sent to the engine after them."""
        return bool(way) and any(self._way(rank, way) in NETWORKS for rank in self._ranks())

    def _ranks(self) -> list[int]:
        return [hello.rank.rank for hello in self.hellos]

    def _way(self, rank: int, way: str) -> str:
        """Return how a worker is reached: by memory, unless it runs elsewhere or a network is asked for."""
        if way == SEGMENT or way in NETWORKS:
            return way
        hello = next(hello for hello in self.hellos if hello.rank.rank == rank)
        is_elsewhere = bool(hello.host) and hello.host != self._host
        by_network = is_network(self._given.get(rank, "")) or (is_elsewhere and hello.network)
        return NETWORK if by_network else SEGMENT

    def _connect(self, hello: messages.Hello, way: str) -> tuple[SegmentReader | NetworkReader, Callable[[], Caller]]:
        """Return a reader of one worker, and what makes a caller."""
        if way == SEGMENT:
            return SegmentReader(hello.address), lambda: Caller(hello.calls)
        given = self._given.get(hello.rank.rank, "")
        where = given if is_network(given) else hello.network
        if not where:
            raise TransportError(f"rank {hello.rank.rank} serves no network: {hello.no_network}.")
        terms = self._terms(hello.secret)
        reader = (NixlReader if way == NIXL else NetworkReader)(where, terms)
        return reader, lambda: caller(where, terms)

    def _terms(self, made_there: str = "") -> Access:
        """Return the terms of a worker on a network, which may have told the engine object the secret that it made.

        Raises:
            SpecError: Nobody knows the secret here.
        """
        return self._access or Access(read_secret(made_there or None))


def _way_of(where: str) -> str:
    return NETWORK if is_network(where) else SEGMENT
