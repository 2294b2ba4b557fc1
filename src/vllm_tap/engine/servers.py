"""Sockets of a worker: segments and calls on its host, and a network if it is to serve one. Worker process."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable
from typing import NamedTuple

from vllm_tap.engine.capture.closing import Closable
from vllm_tap.engine.capture.memory import Pools
from vllm_tap.errors import CaptureError, DatasetError, TapError
from vllm_tap.transport.calls import CallServer
from vllm_tap.transport.segment.server import SegmentServer
from vllm_tap.transport.tcp import settings
from vllm_tap.transport.tcp.server import NetworkServer

logger = logging.getLogger("vllm_tap")


class Addresses(NamedTuple):
    """Ways to a worker, by the names that they have in its `Hello`."""

    address: str
    calls: str
    network: str
    no_network: str
    write_root: str


class Servers:
    """Servers of one worker; the first that is asked for an address of this host starts those.

    Args:
        rank: Of the worker.
        pools: For the memory of clients.
        call: Answers a call.
        on_disconnect: Told the number of a client that is gone.
        closing: Takes what is to be closed when the worker ends.

    Attributes:
        new_secret: What clients of the network have to know, if it was made here; else empty.
    """

    def __init__(
        self,
        rank: int,
        pools: Pools,
        call: Callable[[bytes], bytes],
        on_disconnect: Callable[[int], None],
        closing: list[Closable],
    ) -> None:
        self._rank, self._pools, self._call, self._on_disconnect = rank, pools, call, on_disconnect
        self._closing = closing
        self._client_numbers = itertools.count(1)
        self._segments: SegmentServer | None = None
        self._calls: CallServer | None = None
        self._network: NetworkServer | None = None
        self._write_root = ""
        self._no_network = "it was started without VLLM_TAP_LISTEN=host:port"
        self.new_secret = ""

    def listen(self, local_rank: int) -> None:
        """Serve clients of a network, if this worker is to; where it cannot, generation goes on."""
        try:
            given = settings.read(os.environ, local_rank)
            if given is None:
                return
            new_pool = functools.partial(self._pools.add, shared=False)
            self._network = NetworkServer(given, new_pool, self._call_server(), self._client_numbers)
        except TapError as error:
            self._no_network = str(error)
            logger.error("vllm-tap: rank %d serves no network: %s", self._rank, error)
            return
        self._network.on_disconnect = self._on_disconnect
        self._closing.append(self._network)
        self._write_root = given.write_root
        self.new_secret = given.secret.decode() if given.is_random else ""
        how = "within TLS" if given.tls else "in the clear"
        logger.info("vllm-tap: rank %d serves %s %s", self._rank, self._network.address, how)

    def addresses(self) -> Addresses:
        """Return the ways to this worker."""
        network = self._network
        return Addresses(
            self._segment_server().address,
            self._call_server().address,
            network.address if network is not None else "",
            self._no_network if network is None else "",
            self._write_root,
        )

    def of(self, client: int) -> SegmentServer | NetworkServer:
        """Return the server that a client is connected to.

        Raises:
            CaptureError: None.
        """
        for server in (self._segment_server(), self._network):
            if server is not None and server.is_connected(client):
                return server
        raise CaptureError(f"rank {self._rank}: client {client} is not connected any more: connect again.")

    def is_remote(self, client: int) -> bool:
        """Tell whether a client has come over the network, from wherever.

        Raises:
            CaptureError: It is not connected.
        """
        return self.of(client) is self._network

    def folder_of(self, client: int) -> str | None:
        """Return the folder below which this worker writes for a client; None if that may name any.

        Raises:
            CaptureError: The client is not connected.
            DatasetError: It writes nothing for clients of its network.
        """
        if not self.is_remote(client):
            return None
        if not self._write_root:
            raise DatasetError(
                f"rank {self._rank} writes no datasets for clients of its network: start it with "
                f'{settings.WRITE_VARIABLE}=/folder, or use writers="client".'
            )
        return self._write_root

    def settle(self, timeout_s: float) -> None:
        """Wait until the calls that have come are handled, or this time is over."""
        if self._calls is not None:
            self._calls.settle(timeout_s)

    def _segment_server(self) -> SegmentServer:
        if self._segments is None:
            self._segments = SegmentServer(self._pools.add_client, self._client_numbers)
            self._segments.on_disconnect = self._on_disconnect
            self._closing.append(self._segments)
        return self._segments

    def _call_server(self) -> CallServer:
        if self._calls is None:
            self._calls = CallServer(self._call)
            self._closing.append(self._calls)
        return self._calls
