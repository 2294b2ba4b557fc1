#!/usr/bin/env python3
"""Time the tap's kernel inside a CUDA graph of layer-like work, in several variants: microseconds per tap.

    python bench/tap_kernel.py [--rows 8 64 256]

A layer is a matrix product with weights of its own (so that the caches are cold, as between real layers) and an add.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import triton
import triton.language as tl

LAYERS, WIDTH = 32, 4096


@triton.jit
def null(pointer):
    tl.store(pointer, 1, mask=tl.program_id(0) < 0)


@triton.jit(do_not_specialize=["index"])
def tap(header, table, row_map, counts, anchor, hidden, residual, index, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
        PDL: tl.constexpr, COUNT: tl.constexpr, TRIGGER: tl.constexpr):
    row = tl.program_id(0)
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
    if TRIGGER:
        tl.extra.cuda.gdc_launch_dependents()
    x = tl.load(hidden + row.to(tl.int64) * stride + column, mask=inside, other=0)
    y = tl.load(residual + row.to(tl.int64) * stride + column, mask=inside, other=0)
    x = tl.where(mode == 0, x.to(tl.float32) + y.to(tl.float32), x.to(tl.float32))
    far = (base - anchor.to(tl.int64)) // 16 * 8
    tl.store(anchor + far + slot.to(tl.int64) * WIDTH + column, x.to(tl.bfloat16), mask=inside & live)
    if COUNT:
        if (row == 0) & (tl.program_id(1) == 0):
            tl.atomic_add(counts + index, 1, mask=(plane >= 0) & (num_tokens > 0), sem="relaxed")


class State:
    def __init__(self, rows: int) -> None:
        self.staging = torch.zeros(LAYERS, 1024, WIDTH, dtype=torch.bfloat16, device="cuda")
        self.header = torch.zeros(16, dtype=torch.int64, device="cuda")
        self.header[:3] = torch.tensor([rows, self.staging.data_ptr(), 1024 * WIDTH * 2])
        self.table = torch.tensor([[i, 0] for i in range(LAYERS)], dtype=torch.int32, device="cuda")
        self.row_map = torch.arange(1024, dtype=torch.int32, device="cuda")
        self.counts = torch.zeros(LAYERS, dtype=torch.int32, device="cuda")
        self.anchor = torch.empty(64, dtype=torch.bfloat16, device="cuda")


def launch(state: State, hidden: torch.Tensor, residual: torch.Tensor, index: int, options: dict[str, Any]) -> None:
    block = options.get("block", 1024)
    tap[(hidden.shape[0], WIDTH // block)](
        state.header, state.table, state.row_map, state.counts, state.anchor, hidden, residual, index, hidden.stride(0),
        WIDTH=WIDTH, BLOCK=block, PDL=options.get("pdl", False), COUNT=options.get("count", True),
        TRIGGER=options.get("trigger", False), num_warps=options.get("warps", 4),
        **({"launch_pdl": True} if options.get("pdl") else {}),
    )


def build(rows: int, weights: list[torch.Tensor], variant: str, options: dict[str, Any]) -> Any:
    state = State(rows)
    x = torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()

    def step() -> None:
        hidden, residual = x, x.clone()
        for index, weight in enumerate(weights):
            hidden = hidden @ weight
            if variant == "null":
                null[(1,)](state.counts)
            elif variant == "tap":
                launch(state, hidden, residual, index, options)
            elif variant == "fork":
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    launch(state, hidden, residual, index, options)
            residual = residual + hidden
            if variant == "fork":
                torch.cuda.current_stream().wait_stream(side)

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, state


def time_us(graph: Any) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(20):
        begin.record()
        for _ in range(5):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / 5)
    return statistics.median(times)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "null kernel": ("null", {}),
    "tap": ("tap", {}),
    "tap, no count": ("tap", {"count": False}),
    "tap, block 4096 warps 8": ("tap", {"block": 4096, "warps": 8}),
    "tap, block 512 warps 2": ("tap", {"block": 512, "warps": 2}),
    "tap, pdl": ("tap", {"pdl": True}),
    "tap, pdl + trigger": ("tap", {"pdl": True, "trigger": True}),
    "tap, pdl, no count": ("tap", {"pdl": True, "count": False}),
    "tap, forked": ("fork", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 64, 256])
    args = parser.parse_args()
    weights = [torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(LAYERS)]
    for rows in args.rows:
        graphs = {}
        for name, (variant, options) in VARIANTS.items():
            try:
                graphs[name] = build(rows, weights, variant, options)
            except Exception as error:
                print(f"{rows:4d} rows  {name:28s} failed: {type(error).__name__}: {str(error)[:200]}", flush=True)
        times: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(5):
            for name, (graph, _) in graphs.items():
                times[name].append(time_us(graph))
        base = statistics.median(times["none"])
        for name, values in times.items():
            median = statistics.median(values)
            written = graphs[name][1].staging[:, :rows].float().abs().mean().item()
            print(
                f"{rows:4d} rows  {name:28s} step {median:8.1f} us  per tap {(median - base) / LAYERS:6.2f} us  "
                f"(mean {written:.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
