"""Ratio and speed of every codec on the hidden states of a saved capture, on one core.

`make bench-codecs` captures those of the demo's model and runs this: `python -m vllm_tap.bench.codecs --input
states.safetensors --out bench/results/codecs-cpu.json`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import struct
import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

from vllm_tap import codec
from vllm_tap.bench.machine import describe_commit, describe_machine

ITEMSIZES: Final = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "U8": 1, "I16": 2, "I32": 4, "I64": 8}
PACKAGES: Final = ("lz4", "zstandard")


class Tensor(NamedTuple):
    """The bytes of one tensor of the file."""

    data: bytes
    itemsize: int
    dtype: str


class Pass(NamedTuple):
    """One pass of one codec over all tensors, in seconds of this thread's processor time."""

    encode_s: float
    decode_s: float
    encoded_bytes: int


def read_tensors(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """Return the hidden states of a file of `vllm-tap capture --save` as bytes, and its metadata.

    Raises:
        SystemExit: There are none in it.
    """
    content = path.read_bytes()
    start = 8 + struct.unpack_from("<Q", content)[0]
    header: dict[str, Any] = json.loads(content[8:start])
    metadata = header.pop("__metadata__", {})
    tensors = []
    for name, entry in header.items():
        if ".hidden_states." not in name:
            continue
        first, last = entry["data_offsets"]
        tensors.append(Tensor(content[start + first : start + last], ITEMSIZES[entry["dtype"]], entry["dtype"]))
    if not tensors:
        raise SystemExit(f"{path} holds no hidden states: save a capture of them with vllm-tap capture --save")
    return tensors, metadata


def run_once(name: str, tensors: list[Tensor]) -> Pass:
    """Encode and decode all tensors, and check that they come back."""
    this = codec.get(name)
    started = time.thread_time()
    encoded = [this.encode(memoryview(tensor.data), tensor.itemsize) for tensor in tensors]
    between = time.thread_time()
    decoded = [
        owned(this.decode(memoryview(data), len(tensor.data), tensor.itemsize), data)
        for data, tensor in zip(encoded, tensors, strict=True)
    ]
    ended = time.thread_time()
    if any(bytes(data) != tensor.data for data, tensor in zip(decoded, tensors, strict=True)):
        raise AssertionError(f"codec {name!r} did not give back what it was given")
    return Pass(between - started, ended - between, sum(map(len, encoded)))


def owned(decoded: bytes | memoryview, encoded: bytes) -> bytes | memoryview:
    """Return `decoded`, copied if it is a view of the encoded bytes, as a reader has to."""
    return bytes(decoded) if isinstance(decoded, memoryview) and decoded.obj is encoded else decoded


def measure(tensors: list[Tensor], repeats: int) -> dict[str, dict[str, float]]:
    """Return ratio and median GB/s by codec. Codecs take turns, so that a busy machine slows all of them."""
    passes: dict[str, list[Pass]] = {name: [] for name in codec.names() if codec.installed(name)}
    for _ in range(repeats):
        for name, done in passes.items():
            done.append(run_once(name, tensors))
    return {name: summary(sum(len(tensor.data) for tensor in tensors), done) for name, done in passes.items()}


def summary(nbytes: int, passes: list[Pass]) -> dict[str, float]:
    """Return the figures of one codec: ratio, and median, least and greatest speed of both sides."""
    figures = {"ratio": round(nbytes / passes[0].encoded_bytes, 4)}
    for side, seconds in (("encode", [p.encode_s for p in passes]), ("decode", [p.decode_s for p in passes])):
        rates = sorted(nbytes / s / 1e9 for s in seconds)
        figures[f"{side}_gb_per_s"] = round(statistics.median(rates), 3)
        figures[f"{side}_gb_per_s_min"] = round(rates[0], 3)
        figures[f"{side}_gb_per_s_max"] = round(rates[-1], 3)
    return figures


def main() -> None:
    """Measure, print one line per codec and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--input", type=Path, required=True, help="safetensors file with the tensors to encode")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    tensors, metadata = read_tensors(options.input)
    load = os.getloadavg()[0]
    results = measure(tensors, options.repeats)
    report = {
        "benchmark": "codecs",
        "command": f"python -m vllm_tap.bench.codecs --input {options.input.name} --out {options.out}",
        "clock": "thread processor time, one thread; medians over all tensors of the file, codecs interleaved",
        "repeats": options.repeats,
        "load_average_1_min": round(load, 2),
        "input": {
            "tensors": len(tensors),
            "bytes": sum(len(tensor.data) for tensor in tensors),
            "dtypes": sorted({tensor.dtype for tensor in tensors}),
            "metadata": metadata,
        },
        "commit": describe_commit(),
        "machine": describe_machine() | {name: importlib.metadata.version(name) for name in PACKAGES},
        "results": results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    for name, figures in results.items():
        sys.stdout.write(f"{name:10s} {json.dumps(figures)}\n")


if __name__ == "__main__":
    main()
