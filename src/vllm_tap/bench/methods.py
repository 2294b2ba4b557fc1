"""Ways to bring a stack of tensors from one process to another, each with its two halves side by side.

`send` runs in the worker process of the benchmark, `receive` in the client process.
"""

from __future__ import annotations

import os
from typing import ClassVar

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.bench.channel import Channel
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer

Layers = list[torch.Tensor]


class Descriptor(msgspec.Struct, frozen=True, array_like=True):
    """Place of a stack of bfloat16 tensors."""

    block: tuple[int, int, int, int]
    shape: tuple[int, int, int]


class Array(msgspec.Struct, frozen=True):
    """One tensor in a message of the old kind. The decoder gives a view of the message, so it adds no copy."""

    data: memoryview
    shape: tuple[int, ...]
    dtype: str


_encode = msgspec.msgpack.encode
_decode_descriptor = msgspec.msgpack.Decoder(Descriptor).decode
_decode_arrays = msgspec.msgpack.Decoder(dict[int, Array]).decode
_decode_lists = msgspec.msgpack.Decoder(list[list[float]]).decode


class Worker:
    """Parts that the sending half works with."""

    def __init__(self, channel: Channel, pool: SegmentPool, server: SegmentServer, client: int) -> None:
        self.channel = channel
        self.pool = pool
        self.server = server
        self.client = client


class Client:
    """Parts that the receiving half works with."""

    def __init__(self, channel: Channel, reader: SegmentReader) -> None:
        self.channel = channel
        self.reader = reader


class Method:
    """One way. `prepare` is not timed; the time runs from the client's word until it holds the tensors."""

    name: ClassVar[str]
    label: ClassVar[str]

    def prepare(self, worker: Worker, stack: torch.Tensor) -> None:
        """Bring the worker into the state in which a call finds it."""

    def send(self, worker: Worker, stack: torch.Tensor) -> None:
        """Send a stack [L, R, W], bfloat16."""
        raise NotImplementedError

    def receive(self, client: Client) -> Layers:
        """Return L tensors [R, W], bfloat16."""
        raise NotImplementedError


class Lists(Method):
    """Nested lists of Python floats, rebuilt with `np.array`: the stall.

    One layer a message: the lists of all 32 layers would need 4 GB in either process at once, and time on top.
    """

    name = "lists"
    label = "nested lists, msgpack"

    def send(self, worker: Worker, stack: torch.Tensor) -> None:
        worker.channel.send(_encode(len(stack)))
        for layer in stack:
            worker.channel.send(_encode(layer.float().numpy().tolist()))

    def receive(self, client: Client) -> Layers:
        num_layers = msgspec.msgpack.decode(client.channel.receive())
        return [self._receive_layer(client) for _ in range(num_layers)]

    def _receive_layer(self, client: Client) -> torch.Tensor:
        nested = _decode_lists(client.channel.receive())
        return torch.from_numpy(np.array(nested, dtype=np.float32)).to(torch.bfloat16)


class Float32Bytes(Method):
    """Bytes that are always float32, copied on arrival and cast back: the cure that the project started from."""

    name = "float32-bytes"
    label = "float32 bytes, msgpack"

    def send(self, worker: Worker, stack: torch.Tensor) -> None:
        worker.channel.send(_encode(_arrays(stack, [layer.float().numpy().tobytes() for layer in stack])))

    def receive(self, client: Client) -> Layers:
        return [_from_float32(array) for array in _decode_arrays(client.channel.receive()).values()]


class Bfloat16Bytes(Method):
    """Bytes as they are, used where the decoder puts them."""

    name = "bfloat16-bytes"
    label = "bfloat16 bytes, msgpack"

    def send(self, worker: Worker, stack: torch.Tensor) -> None:
        worker.channel.send(_encode(_arrays(stack, [as_bytes(layer).tobytes() for layer in stack])))

    def receive(self, client: Client) -> Layers:
        return [
            torch.frombuffer(array.data, dtype=torch.bfloat16).view(array.shape)
            for array in _decode_arrays(client.channel.receive()).values()
        ]


class SegmentCopy(Method):
    """A block of a segment, filled with one copy by the worker."""

    name = "segment-copy"
    label = "vllm-tap, segment, one copy"

    def prepare(self, worker: Worker, stack: torch.Tensor) -> None:
        _wait_for_releases(worker.pool)

    def send(self, worker: Worker, stack: torch.Tensor) -> None:
        block = _reserve_and_copy(worker.pool, stack)
        worker.server.publish(worker.client, [block.block_id])
        worker.channel.send(_encode(_descriptor(block, stack)))

    def receive(self, client: Client) -> Layers:
        descriptor = _decode_descriptor(client.channel.receive())
        return _tensors(client.reader.lease(Block(*descriptor.block)).array, descriptor)


class SegmentInPlace(SegmentCopy):
    """A block of a segment that holds the rows already, as a transfer from the device leaves them."""

    name = "segment-in-place"
    label = "vllm-tap, segment, in place"

    def prepare(self, worker: Worker, stack: torch.Tensor) -> None:
        _wait_for_releases(worker.pool)
        self._block = _reserve_and_copy(worker.pool, stack)

    def send(self, worker: Worker, stack: torch.Tensor) -> None:
        worker.server.publish(worker.client, [self._block.block_id])
        worker.channel.send(_encode(_descriptor(self._block, stack)))


METHODS: dict[str, Method] = {
    method.name: method for method in (Lists(), Float32Bytes(), Bfloat16Bytes(), SegmentCopy(), SegmentInPlace())
}


def as_bytes(tensor: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Return a contiguous tensor's bytes, flat, without a copy."""
    return tensor.view(-1).view(torch.uint8).numpy()


def _arrays(stack: torch.Tensor, payloads: list[bytes]) -> dict[int, Array]:
    return {
        number: Array(memoryview(payload), tuple(layer.shape), str(layer.dtype))
        for number, (payload, layer) in enumerate(zip(payloads, stack, strict=True))
    }


def _from_float32(array: Array) -> torch.Tensor:
    values = np.frombuffer(array.data, np.float32).reshape(array.shape).copy()
    return torch.from_numpy(values).to(torch.bfloat16)


def _reserve_and_copy(pool: SegmentPool, stack: torch.Tensor) -> Block:
    source = as_bytes(stack)
    block = pool.reserve(source.nbytes)
    np.copyto(np.frombuffer(pool.view(block), np.uint8), source)
    return block


def _descriptor(block: Block, stack: torch.Tensor) -> Descriptor:
    num_layers, num_rows, width = stack.shape
    return Descriptor(block, (num_layers, num_rows, width))


def _tensors(array: npt.NDArray[np.uint8], descriptor: Descriptor) -> Layers:
    return list(torch.from_numpy(array).view(torch.bfloat16).view(descriptor.shape))


def _wait_for_releases(pool: SegmentPool) -> None:
    """Wait until the rows of the round before are free, so that every round writes into the same, warm pages."""
    while pool.stats().num_blocks:
        os.sched_yield()
