"""Messages on the control channel between client and worker, as msgpack. Tensors never travel here.

A call is one of `Greet`, `Start`, `Finish`, `Take`, `Stop`, `Write` or `Report`; a reply one of `Hello`, `Started`,
`Descriptor`, `Stopped`, `Written` or `Failure`.
Decoding checks the types, `Descriptor.validate` the numbers, before any memory is touched.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec
import numpy as np

from vllm_tap import errors
from vllm_tap.errors import DescriptorError, TapError
from vllm_tap.frame.layout import LABEL_BYTES, IntArray, Layout, Stream, layout
from vllm_tap.frame.routing import Routing
from vllm_tap.labels import NUM_LABELS
from vllm_tap.spec import Choice, read_positions

VERSION: Final = 5
"""Rises whenever a message or the layout of a block changes."""

MAX_MESSAGE_BYTES: Final = 256 << 20
MAX_SEGMENT_BYTES: Final = 1 << 42
MAX_ROWS: Final = 1 << 24
"""Bounds that keep offsets computed from a descriptor far from the end of 64 bits."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all messages."""

    version: int = VERSION


class _Versioned(msgspec.Struct):
    """Part that is read of a message whose fields are not known."""

    version: int


class Rank(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Place of a worker in the engine."""

    rank: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int


class StreamInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stream that a worker could capture: the layers it holds, and their rows."""

    name: str
    dtype: str
    width: int
    layers: tuple[int, ...]
    convention: str


class Greet(Message, frozen=True, tag=True, kw_only=True):
    """Call of a process that has a worker's address and no engine object; the reply is `Hello`."""


class Hello(Message, frozen=True, tag=True, kw_only=True):
    """Reply to `vllm_tap_open` and to `Greet`: what this worker can capture, or why it cannot.

    `residual` is the convention of the decoder layers, where this stage can tell. `reasons` says for streams that are
    missing why; `refusal` is not empty when nothing can be captured at all. `wants_rows` asks for a real forward pass
    of at least so many tokens, unless it is 0, and another call: the dummy passes did not tell the convention. A model
    that takes more than tokens does not ask; the user's requests tell.
    `may_change` asks for another call before each capture: forward passes may show more. `routing` says how the router
    of each layer of this stage chooses; of tensor-parallel ranks, each says it of the layers that it ships.
    `routing_version` rises whenever it changes.
    `address` is the socket that hands out segments, `calls` the one that takes calls. `network` is where clients of
    other hosts connect, empty if the worker does not listen, and then `no_network` says why not; `secret` is what they
    have to know, for the process that has the engine object, where the worker made it; `host` tells hosts apart.
    `write_root` is the folder below which the worker writes for clients of its network, empty if it writes nowhere.
    """

    rank: Rank
    pid: int
    engine: str
    runner: str
    device: str
    num_layers: int
    streams: tuple[StreamInfo, ...]
    residual: str
    reasons: dict[str, str]
    routing: dict[int, Routing]
    routing_version: int = 0
    wants_rows: int
    may_change: bool = False
    address: str
    calls: str
    network: str = ""
    no_network: str = ""
    secret: str = ""
    host: str = ""
    write_root: str = ""
    refusal: str


class Spill(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Folder for the files of rows beyond the memory of a capture, and the most that they may take on this rank."""

    folder: str
    most_bytes: int


class Start(Message, frozen=True, tag=True, kw_only=True):
    """Call that begins a capture, the same for every worker; the reply is `Started`.

    `positions` are those of requests whose mark names none, see `choice`. `clients` gives each rank the number under
    which it knows the client's reader. `expected_rows` is a guess that lets
    the worker prepare memory ahead; 0 if unknown. `routing_versions` gives each rank the version of its `routing` that
    the client knows. Rows beyond `budget_bytes` end the capture, or go to files if `spill` says where.
    """

    capture_id: str
    streams: dict[str, tuple[int, ...]]
    positions: str | tuple[int, ...] | dict[str, list[Any]]
    residual: str
    shared: bool
    clients: dict[int, int]
    budget_bytes: int
    staging: str
    expected_rows: int
    routing_versions: dict[int, int] = {}
    spill: Spill | None = None

    def choice(self) -> Choice:
        """Return `positions` as a `Spec` has them.

        Raises:
            SpecError: They are none.
        """
        return read_positions(self.positions)


class Finish(Message, frozen=True, tag=True, kw_only=True):
    """Call that ends a capture; the reply is its `Descriptor`, which brings the labels of all rows if `labels` says."""

    capture_id: str
    labels: bool = False


class Take(Message, frozen=True, tag=True, kw_only=True):
    """Call that hands over what a capture has taken since the last one; it goes on. The reply is a `Descriptor`."""

    capture_id: str


class Stop(Message, frozen=True, tag=True, kw_only=True):
    """Call that abandons a capture, or the writing of its rows; the reply is `Stopped`."""

    capture_id: str


class Started(Message, frozen=True, tag=True, kw_only=True):
    """Reply to `Start`: what this rank will ship."""

    rank: int
    streams: tuple[Stream, ...]


class Request(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A request that a worker met, in the order of its numbers."""

    request_id: str
    sample: int
    completion: int


class Chunk(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A reservation in a segment, in which blocks lie; the unit of leases."""

    segment_id: int
    offset: int
    nbytes: int
    block_id: int


BLOCK_FIELDS: Final = ("chunk", "offset", "num_rows")
"""Columns of `Descriptor.blocks`: index into `chunks`, byte offset in the segment, rows."""


class Descriptor(Message, frozen=True, tag=True, kw_only=True):
    """Reply to `Finish` and `Take`: everything a client needs to find its rows in the segments of one rank.

    `requests` are those met since the last `Take`, of which the first has the number `first_request`. `blocks` is an
    int64 array [B, 3], one row per step in the order of the steps, little-endian. `routing` is what `Hello` says, as it
    holds for the rows of this capture; None if the client knows its version. `labels`, if asked for, are those of all
    blocks behind one another: int32 [3, R], in `byte_order`.
    """

    rank: int
    capture_id: str
    streams: tuple[Stream, ...]
    requests: tuple[Request, ...]
    first_request: int = 0
    chunks: tuple[Chunk, ...]
    blocks: bytes
    byte_order: str
    wait_seconds: float
    routing_version: int = 0
    routing: dict[int, Routing] | None = None
    labels: bytes | None = None

    def table(self) -> IntArray:
        """Return `blocks` as an array [B, 3].

        Raises:
            DescriptorError: Not a whole number of rows.
        """
        row_bytes = 8 * len(BLOCK_FIELDS)
        if len(self.blocks) % row_bytes:
            raise DescriptorError(f"rank {self.rank}: {len(self.blocks)} bytes are no table of {row_bytes} bytes a row")
        return np.frombuffer(self.blocks, "<i8").reshape(-1, len(BLOCK_FIELDS))

    def validate(self, capture_id: str, byte_order: str) -> Layout[IntArray]:
        """Refuse a descriptor whose numbers cannot be; return where the arrays of its blocks lie.

        Raises:
            DescriptorError: What was expected, and what came.
        """
        if (self.capture_id, self.byte_order) != (capture_id, byte_order):
            raise DescriptorError(
                f"rank {self.rank}: expected capture {capture_id} in {byte_order} endian order, "
                f"got capture {self.capture_id} in {self.byte_order} endian order"
            )
        for chunk in self.chunks:
            if min(chunk.offset, chunk.nbytes) < 0 or max(chunk.offset, chunk.nbytes) > MAX_SEGMENT_BYTES:
                raise DescriptorError(f"rank {self.rank}: {chunk} has a number out of range")
        table = self.table()
        index, offset, num_rows = table.T
        if len(table) and not (
            index.min() >= 0 and index.max() < len(self.chunks) and num_rows.min() >= 1 and num_rows.max() <= MAX_ROWS
        ):
            raise DescriptorError(f"rank {self.rank}: a block names a chunk or a number of rows that cannot be")
        if self.labels is not None and len(self.labels) != NUM_LABELS * LABEL_BYTES * int(num_rows.sum()):
            raise DescriptorError(f"rank {self.rank}: {len(self.labels)} bytes are no labels of {num_rows.sum()} rows")
        # Divided, not multiplied: a product of numbers from outside could wrap around in 64 bits.
        row_bytes = NUM_LABELS * LABEL_BYTES + sum(len(stream.layers) * stream.row_bytes for stream in self.streams)
        bounds = [(chunk.offset, chunk.offset + chunk.nbytes, chunk.nbytes // row_bytes) for chunk in self.chunks]
        starts, ends, room = np.array(bounds, np.int64).reshape(-1, 3)[index].T
        if (num_rows > room).any():
            raise DescriptorError(f"rank {self.rank}: a block of {num_rows.max()} rows does not fit its chunk")
        placed = layout(offset, num_rows, self.streams)
        outside = np.flatnonzero((offset < starts) | (offset > ends) | (placed.end > ends))
        if len(outside):
            row = dict(zip(BLOCK_FIELDS, table[outside[0]].tolist(), strict=True))
            raise DescriptorError(f"rank {self.rank}: block {row} does not fit its {self.chunks[row['chunk']]}")
        return placed


class Write(Message, frozen=True, tag=True, kw_only=True):
    """Call that has rows which were handed over written into shards of a draft of a dataset; the reply is `Written`.

    It begins, and `Report` says how far it is. `client` is the number under which the worker knows the client's reader,
    `pool` the name of that reader's memory. `descriptor` is that of the capture, without requests, routing and labels.
    Each of `shards` is a stream of it and one of its layers, by their places there. `rows` are the rows of each shard,
    int32 [R], by their numbers over all blocks, little-endian.
    """

    capture_id: str
    client: int
    pool: bytes
    folder: str
    descriptor: Descriptor
    shards: tuple[tuple[int, int], ...]
    rows: bytes

    def numbers(self) -> IntArray:
        """Return `rows` as an array, having checked all numbers but those of the pool.

        Raises:
            DescriptorError: What cannot be.
        """
        streams, num_rows = self.descriptor.streams, int(self.descriptor.table()[:, 2].sum())
        if len(self.rows) % 4:
            raise DescriptorError(f"{len(self.rows)} bytes are no numbers of rows")
        numbers = np.frombuffer(self.rows, "<i4").astype(np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < num_rows):
            raise DescriptorError(f"rows {numbers.min()} to {numbers.max()} are to be written, of {num_rows}")
        if len(set(self.shards)) != len(self.shards):
            raise DescriptorError("a shard is to be written twice")
        for stream, layer in self.shards:
            if not (0 <= stream < len(streams) and 0 <= layer < len(streams[stream].layers)):
                raise DescriptorError(f"shard {stream}, {layer} is to be written, which the capture does not have")
        return numbers


class Report(Message, frozen=True, tag=True, kw_only=True):
    """Call that asks how far the writing of the rows of a capture is; the reply is `Written`."""

    capture_id: str


class WrittenFile(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A file that a worker has written: its name in the draft, length and CRC-32."""

    name: str
    nbytes: int
    crc32: int


class Written(Message, frozen=True, tag=True, kw_only=True):
    """Reply to `Write` and `Report`: the files, which the disk has; None while they are written."""

    rank: int
    files: tuple[WrittenFile, ...] | None = None


class Stopped(Message, frozen=True, tag=True, kw_only=True):
    """Reply to calls that only end something."""

    rank: int


class Failure(Message, frozen=True, tag=True, kw_only=True):
    """Reply of a worker that could not do what was asked."""

    rank: int
    error: str
    message: str
    identity: dict[str, int | str | float | None] = {}

    def exception(self) -> TapError:
        """Return the exception that this reply stands for."""
        kind = errors.BY_NAME.get(self.error, errors.CaptureError)
        return kind(f"rank {self.rank}: {self.message}", rank=self.rank, **self.identity)


Call = Greet | Start | Finish | Take | Stop | Write | Report

Reply = Hello | Started | Descriptor | Stopped | Written | Failure

M = TypeVar("M", bound=Message)

_encoder = msgspec.msgpack.Encoder()
_reply_decoder = msgspec.msgpack.Decoder(Reply)
_version_decoder = msgspec.msgpack.Decoder(_Versioned)
_call_decoder = msgspec.msgpack.Decoder(Call)


def encode(message: Message) -> bytes:
    """Return a message as bytes."""
    return _encoder.encode(message)


def decode_reply(data: bytes) -> Reply:
    """Return a worker's reply; a `Failure` is returned, not raised."""
    reply: Reply = _decode(_reply_decoder, data)
    return reply


def decode_call(data: bytes) -> Call:
    """Return what a client asks for."""
    call: Call = _decode(_call_decoder, data)
    return call


def _decode(decoder: msgspec.msgpack.Decoder[M], data: bytes) -> M:
    if len(data) > MAX_MESSAGE_BYTES:
        raise DescriptorError(f"a message of {len(data)} bytes exceeds the limit of {MAX_MESSAGE_BYTES}")
    try:
        message = decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        _require_version(_version_of(data))  # fields may differ because it does
        raise DescriptorError(f"a message did not decode: {error}") from None
    _require_version(message.version)
    return message


def _version_of(data: bytes) -> int:
    """Return what a message that does not decode says of its version; ours if that cannot be read either."""
    try:
        return _version_decoder.decode(data).version
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return VERSION


def _require_version(version: int) -> None:
    if version != VERSION:
        raise DescriptorError(
            f"a message of version {version} came where version {VERSION} runs: install the same vllm-tap in the "
            "environments of the engine and of the client"
        )
