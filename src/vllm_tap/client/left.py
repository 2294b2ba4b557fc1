"""Rows that stay in a worker: this process has their labels, and has them written where they lie. Client process."""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Sequence
from typing import Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.errors import DatasetError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import IntArray, Layout
from vllm_tap.labels import NUM_LABELS
from vllm_tap.transport import threads
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.tcp.reader import NetworkReader

_NO_ROWS: Final = np.empty(0, np.int64)

_LEFT: Final = "the rows of this capture lie in the workers, which write them: read them from the dataset."


class LeftMemory:
    """Blocks of one rank, which are this client's in the worker until this object is gone.

    Attributes:
        rank: Of the worker.
        capture_id: Of the rows.
        placed: Places of the arrays of each block, in its segment.
    """

    def __init__(
        self, descriptor: messages.Descriptor, placed: Layout[IntArray], reader: SegmentReader | NetworkReader
    ) -> None:
        self.rank, self.capture_id, self.placed = descriptor.rank, descriptor.capture_id, placed
        self._labels = descriptor.labels or b""
        self._descriptor = msgspec.structs.replace(descriptor, requests=(), first_request=0, routing=None, labels=None)
        self._client, self._pool_id = reader.client, reader.pool_id
        block_ids = [chunk.block_id for chunk in descriptor.chunks]
        # Not at exit: the end of the connection frees everything, and threads may be gone by then.
        weakref.finalize(self, _let_go, reader, block_ids).atexit = False

    def labels(self, num_rows: IntArray) -> npt.NDArray[np.int32]:
        return np.frombuffer(self._labels, np.int32).reshape(NUM_LABELS, -1)

    def view(self, block: int, offset: int, nbytes: int) -> torch.Tensor:
        raise DatasetError(_LEFT)

    def gather(
        self, blocks: IntArray, index: torch.Tensor, dtype: torch.dtype, width: int, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        raise DatasetError(_LEFT)

    def write(self, folder: str, shards: Sequence[tuple[int, int]] = (), rows: IntArray = _NO_ROWS) -> messages.Write:
        """Return the call that has rows written.

        Args:
            folder: The draft.
            shards: Streams and layers, by their places in the descriptor.
            rows: Numbers of the rows of each, over all blocks.
        """
        return messages.Write(
            capture_id=self.capture_id,
            client=self._client,
            pool=self._pool_id,
            folder=folder,
            descriptor=self._descriptor,
            shards=tuple((stream, layer) for stream, layer in shards),
            rows=rows.astype("<i4").tobytes(),
        )


def nothing_left(capture_id: str, rank: int, reader: SegmentReader | NetworkReader) -> LeftMemory:
    """Return memory without rows: what is written of it is nothing, and fails where nothing could be written."""
    nothing = messages.Descriptor(
        rank=rank,
        capture_id=capture_id,
        streams=(),
        requests=(),
        chunks=(),
        blocks=b"",
        byte_order=sys.byteorder,
        wait_seconds=0.0,
    )
    return LeftMemory(nothing, nothing.validate(capture_id, sys.byteorder), reader)


def _let_go(reader: SegmentReader | NetworkReader, block_ids: list[int]) -> None:
    if isinstance(reader, SegmentReader):
        reader.release(block_ids)
        return
    # The garbage collector may call this, inside whatever: over a network, another thread waits for the socket.
    with contextlib.suppress(RuntimeError):
        threads.start_bare(functools.partial(reader.release, block_ids), stop=lambda: None)
