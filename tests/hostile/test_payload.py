"""Mutated payloads: refused with DescriptorError or read correctly, and never with memory beyond what the limit allows.

Run by hand for more: `python tests/hostile/test_payload.py --count 100000`.
"""

from __future__ import annotations

import argparse
import copy
import random
import resource
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import pytest
import torch

from vllm_tap import codec
from vllm_tap.errors import DescriptorError
from vllm_tap.legacy.payload import DTYPES, deserialize, serialize

LIMIT_BYTES: Final = 1 << 16
SCRATCH_BYTES: Final = LIMIT_BYTES
"""What a reader may use beside the tensors: one block of a codec, here no longer than a tensor."""

ADDRESS_SPACE: Final = 1 << 28
"""What the process may map while it reads: an allocation that a header lied about ends as MemoryError, not in swap."""

SAMPLE: Final = 20
"""One payload in so many is read under tracemalloc, which slows reading several times."""

ODD_VALUES: Final = (
    None, True, -1, 0, 1, 2, 3, 1 << 31, 1 << 40, 1 << 63, 10**5000, 0.5, float("nan"), "", "raw", "lz4", "zstd",
    "bytesplit", "torch.bfloat16", "torch.float32", "torch.int64", "torch.float8_e4m3fn", "x" * 5000, b"", b"\0" * 64,
    [], [[]], [0.0], [4, 8], [8, 4], [32], [-4, -8], [1 << 32, 1 << 32], [0, 1 << 62], {}, {"data": b""},
)  # fmt: skip


def originals() -> list[tuple[dict[int, Any], dict[int, torch.Tensor]]]:
    """Return payloads of every form and codec, each with the tensors that it stands for."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for dtype in (torch.bfloat16, torch.float32, torch.int32):
        states = {layer: (torch.randn(4, 8, generator=generator) * 9).to(dtype) for layer in (0, 5)}
        found += [(serialize(states, name), states) for name in codec.names()]
        header = {"shape": [4, 8], "dtype": str(dtype)}
        found.append(({layer: {"data": state.tolist(), **header} for layer, state in states.items()}, states))
        if dtype.is_floating_point:
            wide = {layer: state.float().numpy().tobytes() for layer, state in states.items()}
            found.append(({layer: {"data": data, **header} for layer, data in wide.items()}, states))
    return found


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """Return `data` with a bit flipped, cut, extended, or with a run of bytes replaced."""
    changed, at = bytearray(data), rng.randrange(len(data) + 1)
    kind = rng.randrange(4)
    if kind == 0 and data:
        changed[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at:at] = rng.randbytes(rng.randrange(1, 9))
    else:
        changed[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", rng.randbytes(4)])
    return bytes(changed)


def change_data(rng: random.Random, entry: dict[str, Any]) -> None:
    """Change the bytes, or one item of one of the nested lists."""
    if isinstance(entry.get("data"), bytes):
        entry["data"] = change_bytes(rng, entry["data"])
        return
    where = entry.get("data")
    while isinstance(where, list) and where:
        index = rng.randrange(len(where))
        if not isinstance(where[index], list) or rng.random() < 0.3:
            where[index] = rng.choice(ODD_VALUES)
            return
        where = where[index]


def change_size(rng: random.Random, entry: dict[str, Any]) -> None:
    """Change one size of the shape, or how many there are."""
    shape = entry.get("shape")
    if isinstance(shape, list) and shape:
        shape[rng.randrange(len(shape))] = rng.choice([*ODD_VALUES, 5, 7, 16, 1 << 20, 1 << 28])
        if rng.random() < 0.2:
            shape.append(rng.choice([1, 2, 1 << 20]))


def change_field(rng: random.Random, entry: dict[str, Any]) -> None:
    """Replace, drop or add a field."""
    key = rng.choice([*entry, "format", "codec", "crc32", "note"])
    if rng.random() < 0.2:
        entry.pop(key, None)
    else:
        entry[key] = rng.choice([*ODD_VALUES, *DTYPES, *codec.names()])


CHANGES: Final[list[Callable[[random.Random, dict[str, Any]], None]]] = [change_data, change_size, change_field]


def mutate(rng: random.Random, original: dict[int, Any]) -> Any:
    """Return a payload with one to three changes in its values, or in its bytes on the wire."""
    if rng.random() < 0.25:
        wire = msgspec.msgpack.encode(original)
        try:
            return msgspec.msgpack.decode(change_bytes(rng, wire))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return mutate(rng, original)
    payload: dict[Any, Any] = copy.deepcopy(original)
    for _ in range(rng.randrange(1, 4)):
        layer = rng.choice(list(payload))
        if rng.random() < 0.1:
            payload[rng.choice(["0", "5", -1, "x", 3, 10**5000])] = payload.pop(layer)
        elif rng.random() < 0.05:
            payload[layer] = rng.choice(ODD_VALUES)
        elif isinstance(payload[layer], dict):
            rng.choice(CHANGES)(rng, payload[layer])
    return payload


def is_versioned(payload: dict[Any, Any]) -> bool:
    """Tell whether all layers carry a checksum, so that what is read has to be what was written."""
    return all("format" in entry for entry in payload.values())


def check_read(payload: Any, states: dict[int, torch.Tensor]) -> str:
    """Read a payload and return how that went.

    Raises:
        AssertionError: layers with a checksum were read and are not what was written.
    """
    try:
        tensors = deserialize(payload, limit_bytes=LIMIT_BYTES)
    except DescriptorError:
        return "refused"
    if not is_versioned(payload):
        return "read without checksum"
    for layer, tensor in tensors.items():
        same = tensor.dtype == states[layer].dtype and tensor.equal(states[layer])
        if not same:
            raise AssertionError(f"layer {layer} was changed and read")
    return "read as written"


def check_memory(payload: Any, states: dict[int, torch.Tensor]) -> int:
    """Read a payload under tracemalloc and return the peak in bytes."""
    tracemalloc.start()
    try:
        check_read(payload, states)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@contextmanager
def address_space(extra_bytes: int) -> Iterator[None]:
    """Let the process map no more than `extra_bytes` on top of what it has: torch's allocations are bounded, too."""
    with open("/proc/self/statm") as statm:
        mapped = int(statm.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run(count: int, seed: int) -> tuple[Counter[str], int]:
    """Read `count` mutated payloads and return how they went, and the greatest peak among the sampled ones."""
    rng, sources = random.Random(seed), originals()
    outcomes: Counter[str] = Counter()
    peak = 0
    with address_space(ADDRESS_SPACE):
        for number in range(count):
            original, states = sources[number % len(sources)]
            payload = mutate(rng, original)
            try:
                if number % SAMPLE == 0:
                    peak = max(peak, check_memory(payload, states))
                outcomes[check_read(payload, states)] += 1
            except Exception as error:
                error.add_note(f"payload {number} of seed {seed}")
                raise
    return outcomes, peak


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_payloads_are_refused_or_read_as_written(seed: int) -> None:
    """Of 2,000 mutated payloads none escapes as another error, gives other values past a checksum, or takes memory."""
    outcomes, peak = run(1000, seed)
    assert peak < LIMIT_BYTES + SCRATCH_BYTES
    assert sum(outcomes.values()) == 1000
    assert outcomes["refused"] > 500
    assert outcomes["read as written"] > 0


def test_memory_bound_is_one_that_can_be_broken() -> None:
    """Within the bounded address space an allocation of twice the bound fails, so the runs above would notice one."""
    with address_space(ADDRESS_SPACE), pytest.raises(RuntimeError, match="allocate"):
        torch.empty(2 * ADDRESS_SPACE, dtype=torch.uint8)


def main() -> None:
    """Read as many payloads as asked for and print how they went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes, peak = run(options.count, options.seed)
    parts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    bound = LIMIT_BYTES + SCRATCH_BYTES
    sys.stdout.write(f"{options.count} payloads, seed {options.seed}: {parts}; peak {peak} bytes, allowed {bound}\n")
    if peak >= bound:
        raise SystemExit("the peak is above what is allowed")


if __name__ == "__main__":
    main()
