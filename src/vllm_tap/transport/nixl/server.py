"""The worker's end of NIXL: it tells a client where its blocks lie, and serves reads while it waits. Worker process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from vllm_tap.errors import TransportError
from vllm_tap.transport.nixl import frames
from vllm_tap.transport.nixl.agent import Agent, require_nixl
from vllm_tap.transport.tcp.frames import COUNT, decode_ids, release_count
from vllm_tap.transport.tcp.stream import Stream

logger = logging.getLogger("vllm_tap")

PAUSE_SECONDS: Final = 100e-6
"""Between two calls of UCX while a client reads, which leaves the interpreter to the engine."""

Find = Callable[[int], memoryview | None]
"""Bytes of a block of this client by its number; None for none."""


def why_not() -> str:
    """Load NIXL, which takes seconds where it is the first to load torch; return why it cannot be, or nothing."""
    try:
        require_nixl()
    except TransportError as error:
        logger.error("vllm-tap: no rows by NIXL: %s", error)
        return str(error)
    return ""


def serve(stream: Stream, find: Find, is_local: bool) -> None:
    """Serve one client's reads until its connection ends.

    Raises:
        EOFError: The end.
        OSError: Or what ended it.
        DescriptorError: Or a frame that is none.
    """
    try:
        agent = Agent(is_local)
    except TransportError as error:
        refuse(stream, str(error))
        return
    try:
        stream.sendall(frames.OFFER.pack(frames.OFFERED, 0, 0))
        while True:
            stream.wait_readable()
            count = release_count(stream.recv_exactly(COUNT.size))
            _serve_one(stream, agent, find, decode_ids(stream.recv_exactly(8 * count)))
    finally:
        agent.close()


def refuse(stream: Stream, reason: str) -> None:
    """Tell a client why it gets no rows by NIXL."""
    text = reason.encode()[: frames.MAX_REASON_BYTES]
    stream.sendall(frames.OFFER.pack(frames.REFUSED, 0, len(text)) + text)


def _serve_one(stream: Stream, agent: Agent, find: Find, block_ids: Sequence[int]) -> None:
    """Have some blocks read. Views of them keep their memory mapped for as long as UCX may look at it."""
    views = [find(number) for number in block_ids]
    arrays = [np.frombuffer(view, np.uint8) for view in views if view is not None]
    ranges = [(int(array.ctypes.data), array.nbytes) for array in arrays]
    registered = agent.register(ranges) if ranges else None
    try:
        places = iter(ranges)
        told = [(0, 0) if view is None else next(places) for view in views]
        stream.sendall(frames.encode_places(told, agent.metadata(registered) if ranges else b""))
        while not stream.is_readable():
            agent.progress()
            time.sleep(PAUSE_SECONDS)
        stream.recv_exactly(COUNT.size)
    finally:
        if registered is not None:
            agent.deregister(registered)
    # Numbers of blocks are never used again: one that is there still was there all the time.
    stream.sendall(COUNT.pack(sum(find(number) is not None for number in block_ids)))
