#!/usr/bin/env python3
"""Time the tap's kernel inside a CUDA graph of layer-like work, in several variants: microseconds per tap.

    python bench/tap_kernel.py [--rows 8 64 256 8192]

A layer is Llama-3.1-8B's MLP (weights of its own, so that the residual has left the caches as between real layers)
and the fused add and norm that follows. Each variant is compared with the same work without a tap. The last lines say
what it costs to switch the taps of a graph on and off.
"""

# ruff: noqa: N803

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_tap.engine import kernel
from vllm_tap.engine.graphs import GraphSwitch

LAYERS, WIDTH, INNER = 8, 4096, 14336


@triton.jit
def add_norm(hidden, residual, out, summed, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    x = tl.load(hidden + row * WIDTH + column).to(tl.float32) + tl.load(residual + row * WIDTH + column).to(tl.float32)
    tl.store(summed + row * WIDTH + column, x.to(tl.bfloat16))
    scale = tl.rsqrt(tl.sum(x * x) / WIDTH + 1e-5)
    tl.store(out + row * WIDTH + column, (x * scale).to(tl.bfloat16))


@triton.jit(do_not_specialize=["index"])
def tap(
    header,
    table,
    row_map,
    counts,
    anchor,
    hidden,
    residual,
    index,
    stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
    REVERSE: tl.constexpr,
    STREAMING: tl.constexpr,
):
    row = tl.program_id(0)
    if REVERSE:
        row = tl.num_programs(0) - 1 - row
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    plane = tl.load(table + 2 * index)
    mode = tl.load(table + 2 * index + 1)
    num_tokens = tl.load(header)
    slot = tl.load(row_map + row)
    base = tl.load(header + 1) + plane * tl.load(header + 2)
    live = (plane >= 0) & (row < num_tokens) & (slot >= 0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(hidden + row.to(tl.int64) * stride + column, mask=inside, other=0)
    y = tl.load(residual + row.to(tl.int64) * stride + column, mask=inside, other=0)
    x = tl.where(mode == 0, x.to(tl.float32) + y.to(tl.float32), x.to(tl.float32))
    far = (base - anchor.to(tl.int64)) // 16 * 8
    target = anchor + far + slot.to(tl.int64) * WIDTH + column
    if STREAMING:
        tl.store(target, x.to(tl.bfloat16), mask=inside & live, cache_modifier=".cs")
    else:
        tl.store(target, x.to(tl.bfloat16), mask=inside & live)
    if (row == 0) & (tl.program_id(1) == 0):
        tl.atomic_add(counts + index, 1, mask=(plane >= 0) & (num_tokens > 0), sem="relaxed")


class State:
    def __init__(self, rows: int) -> None:
        self.staging = torch.zeros(LAYERS, rows, WIDTH, dtype=torch.bfloat16, device="cuda")
        self.header = torch.zeros(16, dtype=torch.int64, device="cuda")
        self.header[:3] = torch.tensor([rows, self.staging.data_ptr(), rows * WIDTH * 2])
        self.table = torch.tensor([[i, 0] for i in range(LAYERS)], dtype=torch.int32, device="cuda")
        self.row_map = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.counts = torch.zeros(LAYERS, dtype=torch.int32, device="cuda")
        self.start = torch.empty(64, dtype=torch.bfloat16, device="cuda")
        self.switch = GraphSwitch()

    def anchor(self, dtype: torch.dtype) -> torch.Tensor:
        return self.start


def launch(state: State, hidden: torch.Tensor, residual: torch.Tensor, index: int, options: dict[str, Any]) -> None:
    if options.get("package"):
        kernel.launch_tap(state, hidden, residual, index, 0, hidden.dtype, ahead=True)
        if torch.cuda.is_current_stream_capturing():
            state.switch.note(index, torch.cuda.current_stream().cuda_stream)
        return
    block = options.get("block", 1024)
    tap[(hidden.shape[0], WIDTH // block)](
        state.header,
        state.table,
        state.row_map,
        state.counts,
        state.start,
        hidden,
        residual,
        index,
        hidden.stride(0),
        WIDTH=WIDTH,
        BLOCK=block,
        PDL=options.get("pdl", False),
        REVERSE=options.get("reverse", False),
        STREAMING=options.get("streaming", False),
        num_warps=options.get("warps", 4),
        **({"launch_pdl": True} if options.get("pdl") else {}),
    )


def build(rows: int, weights: list[Any], options: dict[str, Any] | None) -> Any:
    state = State(rows)
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    first = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)

    def step() -> None:
        normed, residual = x, first
        for index, (up, down) in enumerate(weights):
            inner = normed @ up
            hidden = (inner[:, :INNER] * inner[:, INNER:]) @ down
            if options is not None:
                launch(state, hidden, residual, index, options)
            out, summed = torch.empty_like(hidden), torch.empty_like(hidden)
            add_norm[(rows,)](hidden, residual, out, summed, WIDTH=WIDTH, num_warps=8)
            normed, residual = out, summed

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with state.switch.keeping():
        graph = torch.cuda.CUDAGraph()
    state.switch.turn(frozenset(range(LAYERS)))
    with torch.cuda.graph(graph):
        step()
    return graph, state


def time_us(graph: Any, replays: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(9):
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / replays)
    return statistics.median(times)


VARIANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "the package's own": {"package": True},
    "tap": {},
    "reverse": {"reverse": True},
    "streaming": {"streaming": True},
    "reverse, streaming": {"reverse": True, "streaming": True},
    "block 4096 warps 8": {"block": 4096, "warps": 8},
    "block 4096 warps 8, reverse, streaming": {"block": 4096, "warps": 8, "reverse": True, "streaming": True},
    "block 2048 warps 4, reverse": {"block": 2048, "warps": 4, "reverse": True},
    "pdl": {"pdl": True},
    "pdl, reverse": {"pdl": True, "reverse": True},
    "pdl, block 2048 warps 4": {"pdl": True, "block": 2048, "warps": 4},
}


def switching(weights: list[Any]) -> None:
    """Print what it costs to switch all taps of a graph, and to launch it afterwards."""
    graph, state = build(8, weights, {"package": True})
    times: dict[str, list[float]] = {}

    def timed(label: str, work: Any) -> None:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        times.setdefault(f"{label}: call", []).append(returned - begin)
        times.setdefault(f"{label}: until done", []).append(time.perf_counter() - begin)

    for turn in range(40):
        state.switch.turn(frozenset(range(LAYERS)) if turn % 2 else frozenset())
        kind = "on" if turn % 2 else "off"
        timed(f"switch {LAYERS} taps {kind}", graph._follow)
        timed(f"first replay, taps {kind}", graph.replay)
        timed(f"second replay, taps {kind}", graph.replay)
    for label, values in sorted(times.items()):
        print(f"{label:40s} {statistics.median(values) * 1e6:9.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32, 64, 128, 256, 512, 8192])
    args = parser.parse_args()
    scale = 0.02
    weights = [
        (
            torch.randn(WIDTH, 2 * INNER, device="cuda", dtype=torch.bfloat16) * scale,
            torch.randn(INNER, WIDTH, device="cuda", dtype=torch.bfloat16) * scale,
        )
        for _ in range(LAYERS)
    ]
    for rows in args.rows:
        graphs = {name: build(rows, weights, options) for name, options in VARIANTS.items()}
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(7):
            for name, (graph, _) in graphs.items():
                times[name].append(time_us(graph, 2 if rows > 1000 else 5))
        base = statistics.median(times["none"])
        for name, values in times.items():
            per_tap = statistics.median([(v - b) / LAYERS for v, b in zip(values, times["none"], strict=True)])
            print(
                f"{rows:5d} rows  {name:40s} step {statistics.median(values):9.1f} us  per tap {per_tap:7.2f} us",
                flush=True,
            )
        del graphs, base
    switching(weights)


if __name__ == "__main__":
    main()
