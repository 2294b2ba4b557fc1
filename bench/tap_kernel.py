#!/usr/bin/env python3
"""Time the tap's kernel inside a CUDA graph of layer-like work, in several variants: microseconds per tap.

    python bench/tap_kernel.py [--rows 8 64 256 8192]       # --rows alone: what does not depend on the number of rows

A layer is Llama-3.1-8B's MLP (weights of its own, so that the residual has left the caches as between real layers)
and the fused add and norm that follows. Each variant is compared with the same work without a tap. The last lines say
what it costs to switch the taps of a graph on and off, and what else a step may put on the engine's stream.
"""

# ruff: noqa: N803

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import statistics
import time
from collections import Counter
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_tap.engine.cuda import driver, kernel
from vllm_tap.engine.cuda.expert_kernel import launch_gather_experts, launch_tap_experts
from vllm_tap.engine.cuda.graphs import GraphSwitch
from vllm_tap.engine.cuda.tables import new_tables
from vllm_tap.engine.cuda.tapped_graph import NOTHING, Wanted

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
    base = tl.load(header + 2) + plane * tl.load(header + 3)
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


@triton.jit(do_not_specialize=["a", "b", "c", "d"])
def write_words(header, a, b, c, d):
    tl.store(header, a)
    tl.store(header + 1, b)
    tl.store(header + 2, c)
    tl.store(header + 3, d)


class State:
    def __init__(self, rows: int) -> None:
        self.staging = torch.zeros(LAYERS, rows, WIDTH, dtype=torch.bfloat16, device="cuda")
        tables = new_tables(rows, LAYERS, torch.device("cuda"))[0]  # other groups are idle
        self.header, self.table, self.row_map, self.counts = tables.header, tables.table, tables.row_map, tables.counts
        self.group_words = tables.group_words
        self.header[:4] = torch.tensor([rows, 0, self.staging.data_ptr(), rows * WIDTH * 2])
        self.table.copy_(torch.tensor([[i, 0] for i in range(LAYERS)]))
        self.row_map[:rows] = torch.arange(rows)
        self.start = torch.empty(64, dtype=torch.bfloat16, device="cuda")
        self.switch = GraphSwitch(print, lambda held: lambda: None, contextlib.nullcontext())
        self.inputs: list[torch.Tensor] = []
        self.result = self.staging

    def anchor(self, dtype: torch.dtype) -> torch.Tensor:
        return self.start


def launch(state: State, hidden: torch.Tensor, residual: torch.Tensor, index: int, options: dict[str, Any]) -> None:
    if options.get("package"):
        num_groups = options.get("captured_for", 1)
        kernel.launch_tap(state, hidden, residual, index, 0, hidden.dtype, ahead=True, num_groups=num_groups)
        if torch.cuda.is_current_stream_capturing():
            state.switch.note((index,), torch.cuda.current_stream().cuda_stream, len(hidden))
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


@triton.jit
def split_reduce(parts, out, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    place = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    tl.store(out + place, (tl.load(parts + place) + tl.load(parts + ROWS * WIDTH + place)).to(tl.bfloat16))


def reduced(inner: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Multiply in two parts, whose sum a short kernel makes, as cuBLAS does for few rows."""
    rows = len(inner)
    parts = torch.bmm(inner.view(rows, 2, -1).transpose(0, 1), down.view(2, -1, WIDTH)).float()
    out = torch.empty(rows, WIDTH, device="cuda", dtype=torch.bfloat16)
    split_reduce[(rows * WIDTH // 1024,)](parts, out, ROWS=rows, WIDTH=WIDTH)
    return out


def layers(
    rows: int,
    weights: list[Any],
    options: dict[str, Any] | None,
    state: State,
    nodes: list[int] | None = None,
    short: bool = False,
) -> torch.Tensor:
    """Run the work of all layers once; `nodes` gets those of the taps, `short` puts short kernels before them."""
    if not state.inputs:
        torch.manual_seed(0)
        state.inputs = [torch.randn(rows, WIDTH, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    normed, residual = state.inputs
    for index, (up, down) in enumerate(weights):
        inner = normed @ up
        inner = inner[:, :INNER] * inner[:, INNER:]
        hidden = reduced(inner, down) if short else inner @ down
        if options is not None:
            launch(state, hidden, residual, index, options)
            found = driver.last_captured_node(torch.cuda.current_stream().cuda_stream)
            if nodes is not None and found:
                nodes.append(found[1])
        out, summed = torch.empty_like(hidden), torch.empty_like(hidden)
        add_norm[(rows,)](hidden, residual, out, summed, WIDTH=WIDTH, num_warps=8)
        normed, residual = out, summed
    return torch.stack([normed, residual])


def build(rows: int, weights: list[Any], options: dict[str, Any] | None) -> Any:
    state = State(rows)
    for _ in range(3):
        layers(rows, weights, options, state)
    torch.cuda.synchronize()
    with state.switch.keeping():
        graph = torch.cuda.CUDAGraph()
    state.switch.on = Wanted(frozenset(range(LAYERS)), (options or {}).get("groups", 1))
    with torch.cuda.graph(graph):
        state.result = layers(rows, weights, options, state)
    return graph, state


def time_us(replay: Any, replays: int, repeats: int = 9) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(repeats):
        begin.record()
        for _ in range(replays):
            replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / replays)
    return statistics.median(times)


VARIANTS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "the package's own": {"package": True},
    "captured for 8 captures, of 1": {"package": True, "captured_for": kernel.MAX_GROUPS, "groups": 1},
    "captured for 8 captures, of 2": {"package": True, "captured_for": kernel.MAX_GROUPS, "groups": 2},
    "captured for 8 captures, of 8": {"package": True, "captured_for": kernel.MAX_GROUPS, "groups": 8},
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
    """Print what a graph costs whose taps are off, on, or on in part, and what it costs to change that."""
    none, plain = build(8, weights, None)
    graph, state = build(8, weights, {"package": True})
    every, one = Wanted(frozenset(range(LAYERS)), 1), Wanted(frozenset([LAYERS // 2]), 1)
    arms: dict[str, Any] = {"no taps": none, "taps off": NOTHING, "one tap on": one, "taps on": every}
    times: dict[str, list[float]] = {name: [] for name in arms}
    calls: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(25):
        for name, arm in arms.items():
            if arm is not none:
                state.switch.on = arm
            torch.cuda.synchronize()
            before = time.perf_counter()
            (none if arm is none else graph).replay()
            calls[name].append(time.perf_counter() - before)
            times[name].append(time_us((none if arm is none else graph).replay, 20, 1))
    expected = _result(none.replay, plain)
    for name, values in times.items():
        more = statistics.median([a - b for a, b in zip(values, times["no taps"], strict=True)])
        first = statistics.median(calls[name]) * 1e6
        if arms[name] is not none:
            state.switch.on = arms[name]
        same = arms[name] is none or torch.equal(_result(graph.replay, state), expected)
        print(
            f"{name:40s} {statistics.median(values):8.1f} us a step, {more:5.2f} more; first {first:5.2f}; "
            f"results {'equal' if same else 'DIFFER'}",
            flush=True,
        )


def _result(replay: Any, state: State) -> torch.Tensor:
    """Return what the last of many steps in a row has computed."""
    state.result.zero_()
    for _ in range(50):
        replay()
    torch.cuda.synchronize()
    return state.result.clone()


def following(weights: list[Any]) -> None:
    """Print what a tap behind a short kernel costs, with the kernel after it as captured, and starting early."""
    replays, states, graphs = dict[str, Any](), dict[str, State](), []
    stream = torch.cuda.current_stream().cuda_stream
    for name, package in (("no taps", False), ("taps as captured", True), ("next kernel early", True)):
        state, nodes = State(8), list[int]()
        steps = functools.partial(layers, 8, weights, {"package": True} if package else None, state, nodes, short=True)
        steps()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            state.result = steps()
        copy = driver.clone_graph(graph.raw_cuda_graph())
        if name == "next kernel early":
            for node in nodes:
                driver.let_next_start_early(copy, driver.node_in_clone(node, copy))
        print(f"behind a short kernel, {name}: dependencies by data {_dependencies(copy)}", flush=True)
        graphs.append(graph)
        states[name] = state
        replays[name] = functools.partial(driver.bare_launch(), driver.instantiate(copy), stream)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(60):
        for name, replay in replays.items():
            times[name].append(time_us(replay, 20, 1))
    expected = _result(replays["no taps"], states["no taps"])
    for name, values in times.items():
        per_tap = statistics.median((a - b) / LAYERS for a, b in zip(values, times["no taps"], strict=True))
        same = torch.equal(_result(replays[name], states[name]), expected)
        rows = torch.equal(states[name].staging, states["taps as captured"].staging)
        print(
            f"{name:40s} {statistics.median(values):8.1f} us a step, {per_tap:5.2f} a tap; "
            f"results {'equal' if same else 'DIFFER'}, rows {'equal' if rows else 'differ'}",
            flush=True,
        )


EXPERTS, CHOICES, ROUTERS = 128, 8, 48


@triton.jit
def choose(logits, ids, weights, EXPERTS: tl.constexpr, CHOICES: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(logits + row * EXPERTS + tl.arange(0, EXPERTS)).to(tl.float32)
    x = tl.exp(x - tl.max(x))
    place = row * CHOICES + tl.arange(0, CHOICES)
    tl.store(ids + place, tl.argmax(x, 0) + tl.arange(0, CHOICES))
    tl.store(weights + place, tl.max(x) / tl.sum(x) + tl.arange(0, CHOICES).to(tl.float32))


@triton.jit
def gate(ids, weights, logits, EXPERTS: tl.constexpr, CHOICES: tl.constexpr):
    row = tl.program_id(0)
    choice = tl.arange(0, CHOICES)
    x = tl.sum(tl.load(weights + row * CHOICES + choice) * tl.load(ids + row * CHOICES + choice).to(tl.float32))
    tl.store(logits + row * EXPERTS + tl.arange(0, EXPERTS), (x * tl.arange(0, EXPERTS) % 7).to(tl.bfloat16))


class Routers:
    """Chains of short kernels that make logits, ids and weights, and taps of all three behind each."""

    streams = (3, 4, 5)
    group_words = 0  # there is one

    def __init__(self, rows: int) -> None:
        torch.manual_seed(0)
        self.rows = rows
        # Of their own for each layer: a kernel at the end of the graph reads all of them.
        self.logits = torch.randn(ROUTERS + 1, rows, EXPERTS, device="cuda", dtype=torch.bfloat16)
        self.ids = torch.zeros(ROUTERS, rows, CHOICES, device="cuda", dtype=torch.int32)
        self.weights = torch.zeros(ROUTERS, rows, CHOICES, device="cuda", dtype=torch.float32)
        self.outs = torch.bfloat16, torch.uint8, torch.float32
        widths = EXPERTS * 2, CHOICES, CHOICES * 4
        self.staging = [torch.zeros(ROUTERS * rows * width, dtype=torch.uint8, device="cuda") for width in widths]
        words = [0] * kernel.HEADER_WORDS
        words[0] = rows
        for stream, staging, width in zip(self.streams, self.staging, widths, strict=True):
            place = kernel.STREAM_PLACE + 2 * stream
            words[place : place + 2] = staging.data_ptr(), rows * width
        self.header = torch.tensor(words, device="cuda")
        self.table = torch.tensor([[i // 3, 0] for i in range(3 * ROUTERS)], dtype=torch.int32, device="cuda")
        self.row_map = torch.arange(rows, dtype=torch.int32, device="cuda")
        self.counts = torch.zeros(3 * ROUTERS, dtype=torch.int32, device="cuda")
        self.anchors = {out: torch.empty(16, dtype=out, device="cuda") for out in self.outs}
        layers = zip(self.logits, self.ids, self.weights, strict=False)
        addresses = [[3 * layer, *(t.data_ptr() for t in tensors)] for layer, tensors in enumerate(layers)]
        self.sources = torch.tensor(addresses, device="cuda")

    def anchor(self, dtype: torch.dtype) -> torch.Tensor:
        return self.anchors[dtype]

    def run(self, way: str, nodes: list[int]) -> None:
        for layer in range(ROUTERS):
            tensors = self.logits[layer], self.ids[layer], self.weights[layer]
            choose[(self.rows,)](*tensors, EXPERTS=EXPERTS, CHOICES=CHOICES, num_warps=4)
            if way == "together":
                launch_tap_experts(self, tensors, 3 * layer, self.streams[0], self.outs, ahead=True)
            if way == "apart":
                for i, (tensor, stream, out) in enumerate(zip(tensors, self.streams, self.outs, strict=True)):
                    kernel.launch_tap(self, tensor, None, 3 * layer + i, stream, out, ahead=True)
            found = driver.last_captured_node(torch.cuda.current_stream().cuda_stream)
            if found:
                nodes.append(found[1])
            gate[(self.rows,)](*tensors[1:], self.logits[layer + 1], EXPERTS=EXPERTS, CHOICES=CHOICES, num_warps=4)
        if way == "at the end":
            launch_gather_experts(self, tensors, self.sources, self.streams[0], self.outs)


def experts(rows: int) -> None:
    """Print what taps of experts cost between short kernels: three kernels a layer, one, and one for all layers."""
    stream = torch.cuda.current_stream().cuda_stream
    replays, graphs, routers = dict[str, Any](), [], dict[str, Routers]()
    for name in ("none", "apart", "together", "at the end"):
        router, nodes = Routers(rows), list[int]()
        run = functools.partial(router.run, name, nodes)
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph):
            run()
        copy = driver.clone_graph(graph.raw_cuda_graph())
        for node in nodes if name in ("apart", "together") else []:
            driver.let_next_start_early(copy, driver.node_in_clone(node, copy))
        graphs.append(graph)
        routers[name] = router
        replays[name] = functools.partial(driver.bare_launch(), driver.instantiate(copy), stream)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(60):
        for name, replay in replays.items():
            times[name].append(time_us(replay, 10, 1))
    for name, values in times.items():
        more = statistics.median((a - b) / ROUTERS for a, b in zip(values, times["none"], strict=True))
        for staging in routers[name].staging:
            staging.zero_()
        replays[name]()
        parts = zip(routers[name].staging, routers["apart"].staging, strict=True)
        same = all(torch.equal(mine, other) for mine, other in parts)
        print(
            f"{rows:5d} rows  experts {name:30s} {statistics.median(values):8.1f} us a step, {more:5.2f} a layer; "
            f"rows {'equal' if same else 'differ'}",
            flush=True,
        )


def _dependencies(graph: int) -> dict[int, int]:
    """Count the edges of a graph by their data: not 0 where a kernel starts before the one ahead of it has ended."""
    count = ctypes.c_size_t()
    edges = driver._driver().cuGraphGetEdges_v2
    assert edges(ctypes.c_void_p(graph), None, None, None, ctypes.byref(count)) == 0
    first, second = ((ctypes.c_void_p * count.value)() for _ in range(2))
    data = (ctypes.c_uint64 * count.value)()
    assert edges(ctypes.c_void_p(graph), first, second, data, ctypes.byref(count)) == 0
    return dict(Counter(data))


def between_steps(weights: list[Any]) -> None:
    """Print what a step's other operations on the engine's stream cost it."""
    graph, state = build(8, weights, {"package": True})
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    done, ended = torch.cuda.Event(), torch.cuda.Event()
    ended.record(side)
    torch.cuda.synchronize()
    words = state.header.tolist()
    data = state.header.cpu().numpy().tobytes()
    address = state.header.data_ptr()

    def record_and_wait() -> None:
        done.record(main)
        side.wait_event(done)

    pinned = state.header.cpu().pin_memory()

    works: dict[str, Any] = {
        "a copy of the header from pinned memory": lambda: state.header.copy_(pinned, non_blocking=True),
        "4 words by a kernel": lambda: write_words[(1,)](state.header, *words[:4], num_warps=1),
        "nothing": lambda: None,
        "a copy of the header": lambda: driver.memcpy_htod(address, data, main.cuda_stream),
        "an event": lambda: done.record(main),
        "an event that another stream waits for": record_and_wait,
        "a wait for an event that has passed": lambda: main.wait_event(ended),
    }
    for count in (2, 4, 16):
        job = functools.partial(_write_batch, address, words[:count], main.cuda_stream)
        code = job()
        if code:
            print(f"{count} words by memory operations: refused by the driver ({code})")
        else:
            works[f"{count} words by memory operations"] = job
    times: dict[str, list[float]] = {name: [] for name in works}
    calls: dict[str, list[float]] = {name: [] for name in works}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    replays = 20
    for _ in range(25):
        for name, work in works.items():
            begin.record()
            host = 0.0
            for _ in range(replays):
                before = time.perf_counter()
                work()
                host += time.perf_counter() - before
                graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / replays)
            calls[name].append(host * 1e6 / replays)
    for name, values in times.items():
        more = statistics.median([a - b for a, b in zip(values, times["nothing"], strict=True)])
        host = statistics.median(calls[name])
        print(f"{name:40s} {statistics.median(values):8.1f} us a step, {more:5.2f} more; host {host:5.2f}", flush=True)


class _Write(ctypes.Structure):
    """CUstreamBatchMemOpParams of driver.h, as a write of 64 bits."""

    _fields_ = (
        ("operation", ctypes.c_int),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("alias", ctypes.c_uint64),
        ("rest", ctypes.c_uint64),
    )


WRITE_64 = 5  # CU_STREAM_MEM_OP_WRITE_VALUE_64


def _write_batch(address: int, words: list[int], stream: int) -> int:
    jobs = (_Write * len(words))(*[_Write(WRITE_64, address + 8 * i, word) for i, word in enumerate(words)])
    return int(driver._driver().cuStreamBatchMemOp_v2(ctypes.c_void_p(stream), len(words), jobs, 0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="*", default=[8, 32, 64, 128, 256, 512, 8192])
    parser.add_argument("--experts", action="store_true", help="stop behind the taps of experts")
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
                times[name].append(time_us(graph.replay, 2 if rows > 1000 else 5))
        base = statistics.median(times["none"])
        for name, values in times.items():
            per_tap = statistics.median([(v - b) / LAYERS for v, b in zip(values, times["none"], strict=True)])
            print(
                f"{rows:5d} rows  {name:40s} step {statistics.median(values):9.1f} us  per tap {per_tap:7.2f} us",
                flush=True,
            )
        del graphs, base
    for rows in (8, 256):
        experts(rows)
    if args.experts:
        return
    following(weights)
    switching(weights)
    between_steps(weights)


if __name__ == "__main__":
    main()
