"""Time what a row costs on the host, by the number of rows and of requests: no model, no device.

`python -m vllm_tap.bench.rows [--quick] [--out FILE]` runs both sides in one process: a worker's session that selects,
places and labels rows of synthetic steps, and a client that maps them, checks every label and gathers one layer.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import torch

from vllm_tap.bench.machine import describe_commit, describe_machine
from vllm_tap.client.memory import MappedMemory
from vllm_tap.client.rank_rows import RankRows, RowMatcher
from vllm_tap.client.sequences import Sequences
from vllm_tap.engine.capture.cpu import CpuSink
from vllm_tap.engine.capture.session import Session
from vllm_tap.engine.model.tap import Rows
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream
from vllm_tap.labels import Mark
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.transport.segment.reader import SegmentReader
from vllm_tap.transport.segment.server import SegmentServer
from vllm_tap.vllm.runner import Batch

STEP_ROWS: Final = 8192
STREAM: Final = Stream("hidden_states", "float32", 8, (0,))
CASES: Final = [(10**3, 1), (10**4, 1), (10**4, 100), (10**5, 1000), (10**6, 1000), (10**6, 10_000), (10**7, 10_000)]


def steps_of(lengths: list[int], tokens: torch.Tensor) -> Iterator[tuple[Batch, int]]:
    """Yield steps of chunked prompts, and how many tokens each has; requests are named by their numbers."""
    request, done, begin = 0, 0, 0
    while request < len(lengths):
        names, counts, before, room = [], [], [], STEP_ROWS
        while room and request < len(lengths):
            count = min(room, lengths[request] - done)
            names.append(str(request))
            counts.append(count)
            before.append(done)
            room, done = room - count, done + count
            if done == lengths[request]:
                request, done = request + 1, 0
        starts = np.cumsum([0, *counts]).astype(np.int32)
        positions = [torch.arange(first, first + n) for first, n in zip(before, counts, strict=True)]
        end = begin + int(starts[-1])
        yield Batch(names, starts, np.array(before, np.int32), torch.cat(positions), tokens[begin:end]), end - begin
        begin = end


class Sink(CpuSink):
    """Writes labels; there are no taps, and rows stay what they are."""

    def end(self) -> list[Any]:
        """Stop letting rows through."""
        self.clear()
        return []


def run(num_rows: int, num_requests: int) -> dict[str, float]:
    """Return seconds of a capture by part."""
    lengths = [num_rows // num_requests] * num_requests
    tokens = torch.randint(0, 1 << 15, (num_rows,), dtype=torch.int32)
    pool = SegmentPool(1 << 30)
    server = SegmentServer(lambda _: pool)
    reader = SegmentReader(server.address)
    # Memory is made and mapped once in the life of a client.
    block = pool.reserve(num_rows * (STREAM.row_bytes + 16) + (64 << 20))
    reader.segment_array(block.segment_id)
    pool.release(block.block_id)
    start = messages.Start(
        capture_id="x",
        streams={STREAM.name: STREAM.layers},
        positions="all",
        residual="",
        shared=True,
        clients={0: reader.client},
        budget_bytes=1 << 30,
        staging="auto",
        expected_rows=num_rows,
    )
    tap: Any = SimpleNamespace(planes={})
    sink = Sink([STREAM], {(STREAM.name, 0): tap}, {}, Rows(), pool)
    session = Session(start, 0, [STREAM], sink, pool.open_account(1 << 30))
    steps = list(steps_of(lengths, tokens))
    begin = time.perf_counter()
    for number, length in enumerate(lengths):
        session.meet(str(number), Mark("x", number, 1), length)
    for batch, _ in steps:
        session.before_forward(batch)
        session.after_forward()
    descriptor = session.finish()
    worker = time.perf_counter() - begin
    outputs = [
        SimpleNamespace(
            request_id=str(number),
            prompt_token_ids=ids,
            outputs=[SimpleNamespace(index=0, token_ids=[0], finish_reason="length")],
        )
        for number, ids in enumerate(part.tolist() for part in tokens.split(lengths))
    ]
    server.publish(reader.client, session.block_ids)
    begin = time.perf_counter()
    placed = descriptor.validate("x", descriptor.byte_order)
    sequences = Sequences(outputs, "all")
    rows = RankRows(descriptor, MappedMemory(descriptor, placed, reader), RowMatcher(sequences))
    checked = time.perf_counter() - begin
    begin = time.perf_counter()
    assert len(rows.rows(STREAM.name, 0, 0, num_rows)) == num_rows
    gathered = time.perf_counter() - begin
    session.close()
    reader.close()
    server.close()
    return {"worker": worker, "check": checked, "gather": gathered}


def main() -> None:
    """Print nanoseconds a row for each case, and write them if they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="no more than 100,000 rows")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many counts")
    parser.add_argument("--out", type=Path, help="write JSON there")
    options = parser.parse_args()
    found = []
    for num_rows, num_requests in CASES:
        if options.quick and num_rows > 10**5:
            continue
        rounds = [run(num_rows, num_requests) for _ in range(options.rounds)]
        best = {part: min(each[part] for each in rounds) for part in rounds[0]}
        cost = {part: seconds / num_rows * 1e9 for part, seconds in best.items()}
        found.append({"rows": num_rows, "requests": num_requests, "ns_a_row": cost})
        cells = "  ".join(f"{part} {nanoseconds:7.1f} ns" for part, nanoseconds in cost.items())
        print(f"{num_rows:>10} rows  {num_requests:>6} requests  {cells}", flush=True)
    if options.out is not None:
        result = {"machine": describe_machine(), "commit": describe_commit(), "cases": found}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
