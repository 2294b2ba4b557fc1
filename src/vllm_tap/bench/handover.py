"""Time the way of captured tensors from a worker process to a client process, against one memcpy of the same bytes.

`python -m vllm_tap.bench.handover [--quick] [--out FILE]` runs in the client process and starts the worker process.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch

from vllm_tap.bench.channel import Channel
from vllm_tap.bench.machine import describe_commit, describe_machine
from vllm_tap.bench.methods import METHODS, Client, Layers, Worker, as_bytes
from vllm_tap.transport.segment.memory import round_up
from vllm_tap.transport.segment.pool import SEGMENT_GRANULE_BYTES, SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer

MEMCPY = "memcpy"
SLOW_METHODS = {"lists"}
"""Timed in a few rounds only: about 20 s each for hidden states."""


class Case(NamedTuple):
    """A stack of tensors to move."""

    name: str
    num_layers: int
    num_rows: int
    width: int
    num_rounds: int
    num_slow_rounds: int

    @property
    def nbytes(self) -> int:
        """Size in bfloat16."""
        return 2 * self.num_layers * self.num_rows * self.width

    def make(self) -> torch.Tensor:
        """Return the tensors [L, R, W], the same in every process."""
        generator = torch.Generator().manual_seed(self.num_layers)
        shape = self.num_layers, self.num_rows, self.width
        return torch.randn(shape, generator=generator).to(torch.bfloat16)


FULL = [Case("hidden_states", 32, 1000, 4096, 15, 1), Case("router_logits", 48, 1000, 128, 30, 3)]
QUICK = [Case("hidden_states", 4, 1000, 4096, 5, 1), Case("router_logits", 6, 1000, 128, 5, 1)]


def run_worker(connection: socket.socket, cases: list[Case]) -> None:
    """Be the worker process: send what the client names, when it says so."""
    torch.set_num_threads(1)
    channel = Channel(connection)
    size = round_up(max(case.nbytes for case in cases), SEGMENT_GRANULE_BYTES)
    pool = SegmentPool(size, segment_bytes=size)
    server = SegmentServer(lambda _: pool)
    channel.send(server.address.encode())
    worker = Worker(channel, pool, server, client=int(channel.receive().tobytes()))
    stacks = {case.name: case.make() for case in cases}
    while order := channel.receive().tobytes():
        case_name, method_name = msgspec.msgpack.decode(order, type=tuple[str, str])
        method, stack = METHODS[method_name], stacks[case_name]
        method.prepare(worker, stack)
        channel.send(b"ready")
        channel.receive()
        method.send(worker, stack)


@contextmanager
def started_worker(cases: list[Case]) -> Iterator[Client]:
    """Start the worker process and connect to it."""
    ours, theirs = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(target=run_worker, args=(theirs, cases), daemon=True)
    process.start()
    theirs.close()
    channel = Channel(ours)
    reader = SegmentReader(channel.receive().tobytes().decode())
    channel.send(str(reader.client).encode())
    yield Client(channel, reader)
    channel.send(b"")
    process.join()
    reader.close()
    ours.close()


def time_method(client: Client, case: Case, name: str) -> tuple[float, Layers]:
    """Return the seconds from the client's word until it holds the tensors, and these."""
    client.channel.send(msgspec.msgpack.encode((case.name, name)))
    client.channel.receive()
    start = time.perf_counter()
    client.channel.send(b"go")
    layers = METHODS[name].receive(client)
    return time.perf_counter() - start, layers


def time_memcpy(source: torch.Tensor, target: torch.Tensor) -> float:
    """Return the seconds of one copy into memory that has been written before, by one thread."""
    from_bytes, to_bytes = as_bytes(source), as_bytes(target)
    start = time.perf_counter()
    np.copyto(to_bytes, from_bytes)
    return time.perf_counter() - start


def run_case(client: Client, case: Case) -> dict[str, Any]:
    """Time all methods in rounds, in random order, a memcpy before each.

    A round before the first warms up; what arrives in these two is compared.
    """
    expected = case.make()
    target = expected.clone()
    seconds: dict[str, list[float]] = {name: [] for name in (MEMCPY, *METHODS)}
    for number in range(case.num_rounds + 1):
        for name in random.sample(list(METHODS), len(METHODS)):
            if name in SLOW_METHODS and not 1 <= number <= case.num_slow_rounds:
                continue
            memcpy_s = time_memcpy(expected, target)
            took = _timed(client, case, name, expected, number)
            if number:
                seconds[MEMCPY].append(memcpy_s)
                seconds[name].append(took)
    memcpy_s = statistics.median(seconds[MEMCPY])
    return {
        "name": case.name,
        "num_layers": case.num_layers,
        "shape": [case.num_rows, case.width],
        "dtype": "bfloat16",
        "nbytes": case.nbytes,
        "rows": [_row(name, taken, memcpy_s) for name, taken in seconds.items()],
    }


def _timed(client: Client, case: Case, name: str, expected: torch.Tensor, number: int) -> float:
    took, layers = time_method(client, case, name)
    if number <= 1:
        _check(name, layers, expected)
    return took


def _check(name: str, layers: Layers, expected: torch.Tensor) -> None:
    """Compare bits: as integers, so that no NaN and no zero with a sign passes for another."""
    pairs = zip(layers, expected, strict=True)
    if not all(torch.equal(layer.view(torch.int16), right.view(torch.int16)) for layer, right in pairs):
        raise SystemExit(f"{name}: the tensors that arrived are not those that were sent")


def _row(name: str, seconds: list[float], memcpy_s: float) -> dict[str, Any]:
    median_s = statistics.median(seconds)
    return {
        "method": name,
        "label": "memcpy, one thread, warm" if name == MEMCPY else METHODS[name].label,
        "median_ms": _significant(median_s * 1e3),
        "min_ms": _significant(min(seconds) * 1e3),
        "x_memcpy": _significant(median_s / memcpy_s),
        "rounds": len(seconds),
    }


def _significant(value: float, digits: int = 4) -> float:
    return round(value, digits - 1 - math.floor(math.log10(value)))


def main() -> None:
    """Run the benchmark and write its results."""
    parser = argparse.ArgumentParser(prog="python -m vllm_tap.bench.handover", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an eighth of the layers, few rounds")
    parser.add_argument("--out", type=Path, help="results file; bench/results/handover-cpu.json unless --quick")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = QUICK if arguments.quick else FULL
    with started_worker(cases) as client:
        results = {
            "benchmark": "handover",
            "command": "python -m vllm_tap.bench.handover" + (" --quick" if arguments.quick else ""),
            "commit": describe_commit(),
            "machine": describe_machine(),
            "notes": [
                "Time from the client's word until it holds bfloat16 tensors of all layers; one thread a process.",
                "lists: one layer a message, since the lists of all layers at once would take 4 GB in each process.",
                "Channel: Unix stream socket, length and payload; msgspec's msgpack where a message has structure.",
                "in place: the rows are in the segment before the time starts, as after a transfer from a device.",
            ],
            "cases": [run_case(client, case) for case in cases],
        }
    _report(results)
    out = arguments.out or (None if arguments.quick else Path("bench/results/handover-cpu.json"))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n")


def _report(results: dict[str, Any]) -> None:
    for case in results["cases"]:
        print(f"{case['name']}: {case['num_layers']} x {tuple(case['shape'])} bfloat16, {case['nbytes'] / 1e6:.0f} MB")
        for row in case["rows"]:
            print(
                f"  {row['label']:30s} median {row['median_ms']:10.3f} ms  min {row['min_ms']:10.3f} ms  "
                f"{row['x_memcpy']:9.3f} x memcpy  {row['rounds']} rounds"
            )


if __name__ == "__main__":
    main()
