"""A CUDA device for tests: memory, streams, events, graphs and copies in Python, kernels by Triton's interpreter.

Work runs when it is queued, which is one of the orders that a device may choose. Every other order gives the same bytes
if no two accesses to the same bytes, one of them a write, are left unordered by streams, events and waits of the host:
`SimulatedCuda.conflicts` lists those that are. Streams and the host carry vector clocks, as race detectors do.

What is watched: device memory from the driver and registered host memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

from quick_triton import language_patched_once
from vllm_tap.engine.cuda import driver, expert_kernel, kernel, operator

HOST = "host"
CONTEXT = 1
DISABLE_TIMING = 2  # of an event
FULL, EARLY = 0, 1 | 1 << 16  # dependencies in a graph
KERNEL, HOST_CALL = 0, 3  # nodes of a graph
SUCCESS, OUT_OF_MEMORY, INVALID_VALUE, INVALID_CONTEXT = 0, 2, 1, 201


class Access(NamedTuple):
    """Bytes that somebody read or wrote, at a time of their own clock."""

    actor: str
    time: int
    begin: int
    end: int
    writes: bool
    what: str


class Stream:
    """A queue of the device."""

    def __init__(self, device: SimulatedCuda, name: str, handle: int) -> None:
        self.device, self.name, self.cuda_stream = device, name, handle

    def query(self) -> bool:
        return True


class Nodes:
    """A graph as the driver knows it: nodes in the order in which they were recorded, and what each waits for.

    A tap may start when the one before it has ended its programs, and then waits itself for what that one wrote.
    """

    def __init__(self) -> None:
        self.work: dict[int, Callable[..., object]] = {}
        self.depths: dict[int, int] = {}  # programs of a tap along the last axis of its grid
        self.taps: set[int] = set()
        self.others: set[int] = set()  # that are no kernels
        self.touched: dict[int, set[int]] = {}  # storages that a node reads, if it is a tap, or writes
        self.edges: dict[tuple[int, int], int] = {}
        self.originals: dict[int, int] = {}

    def record(
        self, node: int, kind: int, work: Callable[..., object], depth: int, tensors: Iterable[torch.Tensor]
    ) -> None:
        is_tap = bool(depth)
        for last in list(self.work)[-1:]:
            self.edges[last, node] = EARLY if is_tap and last not in self.others else FULL
        if kind != KERNEL and not is_tap:
            self.others.add(node)
        self.work[node] = work
        self.touched[node] = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        if is_tap:
            self.taps.add(node)
            self.depths[node] = depth

    def copy(self, handles: Iterator[int]) -> Nodes:
        copy = Nodes()
        new = copy.originals = {node: next(handles) for node in self.work}
        copy.work = {new[node]: work for node, work in self.work.items()}
        copy.taps = {new[node] for node in self.taps}
        copy.others = {new[node] for node in self.others}
        copy.depths = {new[node]: depth for node, depth in self.depths.items()}
        copy.touched = {new[node]: touched for node, touched in self.touched.items()}
        copy.edges = {(new[first], new[second]): kind for (first, second), kind in self.edges.items()}
        return copy

    def check(self) -> None:
        """Make sure that every node is ordered with all that were recorded before it, as far as it matters.

        Nothing reads what a tap has written. A node waits for a tap before it only if it overwrites what that reads,
        and then for the end of the tap's programs alone.
        """
        done: dict[int, set[int]] = {}
        for place, node in enumerate(self.work):
            before = [first for first, second in self.edges if second == node]
            early = {first for first in before if self.edges[first, node] == EARLY}
            complete = {first for first in before if first not in early or node in self.taps}
            done[node] = complete.union(*(done[first] for first in complete))
            ended = done[node] | early
            for other in list(self.work)[:place]:
                if other not in self.taps:
                    assert other in done[node], "nodes that nothing orders"
                elif node not in self.taps and self.touched[other] & self.touched[node]:
                    assert other in ended, "a tap that may read what was written after it"


class Executable:
    """What is launched: the nodes that a graph had when it was made."""

    def __init__(self, nodes: Nodes) -> None:
        nodes.check()
        self.work = dict(nodes.work)
        self.depths = dict(nodes.depths)
        self.disabled: set[int] = set()
        self.num_early = sum(kind == EARLY and node not in nodes.taps for (_, node), kind in nodes.edges.items())
        self.num_taps = len(nodes.taps & nodes.work.keys())

    def launch(self) -> None:
        for node, run in self.work.items():
            if node not in self.disabled:
                run(*([self.depths[node]] if node in self.depths else []))


class Graph:
    """PyTorch's graph: work that is recorded once and replayed."""

    device: SimulatedCuda

    def __new__(cls, keep_graph: bool = False) -> Any:
        return super().__new__(cls)

    def __init__(self, keep_graph: bool = False) -> None:
        self.keep_graph = keep_graph
        self.handle = next(self.device.handles)
        self.nodes = self.device.graphs[self.handle] = Nodes()
        self.executable: Executable | None = None

    def capture_begin(self) -> None:
        self.device.recording = self

    def capture_end(self) -> None:
        self.device.recording = None
        if not self.keep_graph:
            self.instantiate()

    def instantiate(self) -> None:
        self.executable = Executable(self.nodes)

    def raw_cuda_graph(self) -> int:
        assert self.keep_graph, "a graph that is thrown away cannot be edited"
        return self.handle

    def replay(self) -> None:
        if self.executable is None:
            self.instantiate()
        self.executable.launch()


class SimulatedCuda:
    """The device, and all that was done to its memory and to registered memory of the host.

    Copies and pins fail when none is left.
    """

    def __init__(self, capacity: int) -> None:
        self.device = torch.device("cpu")
        self.free_bytes = self.capacity = capacity
        self.handles: Iterator[int] = itertools.count(1)
        self.clocks: dict[str, dict[str, int]] = {HOST: {HOST: 0}}
        self.streams: dict[int, Stream] = {}
        self.main = self.new_stream()
        self.conflicts: list[str] = []
        self.num_host_waits = 0
        self.num_copies = 0
        self.num_launches = 0
        self.num_programs = 0
        self.runs_kernels = True  # False while variants are warmed that this process has warmed before
        self.copies_left = sys.maxsize
        self.pins_left = sys.maxsize
        self.last_error = SUCCESS  # of the runtime, until it is asked
        self.recording: Graph | None = None
        self.events: dict[int, dict[str, int]] = {}  # the clocks of events, empty until they are recorded
        self.now_ns = 0  # of the device: copies of rows take time, a nanosecond for each byte, and nothing else does
        self._passed_ns: dict[int, int] = {}  # when events passed that are timed
        self.graphs: dict[int, Nodes] = {}
        self.executables: dict[int, Executable] = {}
        self.instances_left = sys.maxsize
        self.edits_left = sys.maxsize
        self.graphs_left = sys.maxsize  # launches of them
        self.kind_of_work = KERNEL
        self._bound = {threading.get_ident()}  # threads that have a context
        self._log: list[Access] = []
        self._watched: dict[int, int] = {}
        self._buffers: dict[int, tuple[Any, int]] = {}
        self._stores: list[tuple[int, int, bool]] = []

    # ------------------------------------------------------------------------------------------------------- order

    def new_stream(self, *_: Any) -> Stream:
        """Return a new stream."""
        handle = next(self.handles)
        stream = self.streams[handle] = Stream(self, f"stream {handle}", handle)
        self.clocks[stream.name] = {stream.name: 0}
        return stream

    def learn(self, actor: str, clock: dict[str, int]) -> None:
        """Put everything that a clock has seen before what the actor does next."""
        mine = self.clocks[actor]
        for other, time in clock.items():
            mine[other] = max(mine.get(other, 0), time)
        if actor == HOST:
            # Whatever is queued from here on comes after what the host has seen.
            self._log = [access for access in self._log if access.time > mine.get(access.actor, 0)]

    def queue(self, stream: str) -> dict[str, int]:
        """Begin the next piece of work of a stream, after all that the host has seen; return its clock."""
        self.learn(stream, self.clocks[HOST])
        self.clocks[stream][stream] += 1
        return self.clocks[stream]

    def access(self, actor: str, begin: int, nbytes: int, writes: bool, what: str) -> None:
        """Note that an actor reads or writes bytes, and what it is not ordered with."""
        if not self._is_watched(begin, nbytes):
            return
        now = self.clocks[actor]
        new = Access(actor, now[actor], begin, begin + nbytes, writes, what)
        for old in self._log:
            overlaps = old.begin < new.end and new.begin < old.end
            if overlaps and old.actor != actor and (writes or old.writes) and now.get(old.actor, 0) < old.time:
                self.conflicts.append(f"{what} on {actor} is not ordered with {old.what} on {old.actor}")
        self._log.append(new)

    def _is_watched(self, begin: int, nbytes: int) -> bool:
        return any(start <= begin and begin + nbytes <= stop for start, stop in self._watched.items())

    def host_access(self, begin: int, nbytes: int, writes: bool, what: str) -> None:
        """Note that the host itself reads or writes bytes."""
        self.clocks[HOST][HOST] += 1
        self.access(HOST, begin, nbytes, writes, what)

    def run(self, work: Callable[..., object], depth: int = 0, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Do work on the main stream, or record it, with the tensors that a tap reads or anything else writes.

        A tap has a grid of some depth, with which it is called.
        """
        if self.recording is not None:
            self.recording.nodes.record(next(self.handles), self.kind_of_work, work, depth, tensors)
        elif depth:
            work(depth)
        else:
            work()

    def captured(self, switch: Any, run: Callable[[], None]) -> Any:
        """Record a graph, of which a switch keeps the taps out."""
        with switch.keeping():
            graph = torch.cuda.CUDAGraph()
            graph.capture_begin()
            run()
            graph.capture_end()
            return graph

    def bind(self) -> None:
        """Give the calling thread the context, as every call of the runtime does that needs one."""
        self._bound.add(threading.get_ident())

    # -------------------------------------------------------------------------------------------------------- driver

    def cuCtxGetCurrent(self, context: Any) -> int:  # noqa: N802
        context._obj.value = CONTEXT if threading.get_ident() in self._bound else 0
        return SUCCESS

    def cuCtxSetCurrent(self, context: Any) -> int:  # noqa: N802
        assert context.value == CONTEXT
        self.bind()
        return SUCCESS

    def cuMemAlloc_v2(self, address: Any, nbytes: int) -> int:  # noqa: N802
        if threading.get_ident() not in self._bound:
            return INVALID_CONTEXT
        if nbytes > self.free_bytes:
            return OUT_OF_MEMORY
        buffer = (ctypes.c_byte * (nbytes + 512))()
        start = -(-ctypes.addressof(buffer) // 512) * 512
        self.free_bytes -= nbytes
        self._buffers[start] = buffer, nbytes
        self._watched[start] = start + nbytes
        address._obj.value = start
        return SUCCESS

    def cuMemFree_v2(self, address: int) -> int:  # noqa: N802
        if threading.get_ident() not in self._bound:
            return INVALID_CONTEXT
        for clock in self.clocks.values():  # it waits for everything that is queued
            self.learn(HOST, clock)
        _, nbytes = self._buffers.pop(address)
        self.free_bytes += nbytes
        self.forget(address)
        return SUCCESS

    def forget(self, begin: int) -> None:
        """Stop watching a range, and what was done there."""
        end = self._watched.pop(begin)
        self._log = [access for access in self._log if access.end <= begin or access.begin >= end]

    def cuMemcpyHtoDAsync_v2(self, target: int, data: Any, nbytes: int, stream: int) -> int:  # noqa: N802
        if threading.get_ident() not in self._bound:
            return INVALID_CONTEXT
        self.queue(self.streams[stream].name)
        ctypes.memmove(target, data, nbytes)
        return SUCCESS

    def cuMemcpyDtoHAsync_v2(self, target: int, source: int, nbytes: int, stream: int) -> int:  # noqa: N802
        if threading.get_ident() not in self._bound:
            return INVALID_CONTEXT
        self.copies_left -= 1
        if self.copies_left < 0:
            return INVALID_VALUE
        name = self.streams[stream].name
        self.queue(name)
        # Not those of what the taps have counted.
        if self._is_watched(source, nbytes):
            self.num_copies += 1
            self.now_ns += nbytes
        self.access(name, source, nbytes, False, f"copy {self.num_copies} from the device")
        self.access(name, target, nbytes, True, f"copy {self.num_copies} to the host")
        ctypes.memmove(target, source, nbytes)
        return SUCCESS

    def cuEventCreate(self, event: Any, flags: int) -> int:  # noqa: N802
        event._obj.value = next(self.handles)
        self.events[event._obj.value] = {}
        if not flags & DISABLE_TIMING:
            self._passed_ns[event._obj.value] = 0
        return SUCCESS

    def cuEventRecord(self, event: int, stream: int) -> int:  # noqa: N802
        if threading.get_ident() not in self._bound:
            return INVALID_CONTEXT
        self.events[event] = dict(self.queue(self.streams[stream].name))
        if event in self._passed_ns:
            self._passed_ns[event] = self.now_ns
        return SUCCESS

    def cuStreamWaitEvent(self, stream: int, event: int, _: int) -> int:  # noqa: N802
        self.learn(self.streams[stream].name, self.events[event])
        return SUCCESS

    def cuEventSynchronize(self, event: int) -> int:  # noqa: N802
        self.num_host_waits += 1
        self.learn(HOST, self.events[event])
        return SUCCESS

    def cuEventElapsedTime(self, milliseconds: Any, first: Any, second: Any) -> int:  # noqa: N802
        begin, end = first.value, second.value
        if not {begin, end} <= self._passed_ns.keys() or not (self.events[begin] and self.events[end]):
            return INVALID_VALUE
        milliseconds._obj.value = (self._passed_ns[end] - self._passed_ns[begin]) / 1e6
        return SUCCESS

    def cuGetErrorName(self, code: int, name: Any) -> int:  # noqa: N802
        name._obj.value = {INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE", INVALID_CONTEXT: b"CUDA_ERROR_INVALID_CONTEXT"}[
            code
        ]
        return SUCCESS

    def cuStreamGetCaptureInfo_v2(  # noqa: N802
        self, stream: int, status: Any, number: Any, graph: Any, nodes: Any, num_nodes: Any
    ) -> int:
        assert self.recording is not None
        graph._obj.value = self.recording.handle
        last = (ctypes.c_void_p * 1)(list(self.recording.nodes.work)[-1])
        nodes._obj.contents = ctypes.c_void_p.from_buffer(last)
        num_nodes._obj.value = 1
        return SUCCESS

    def cuGraphClone(self, clone: Any, graph: Any) -> int:  # noqa: N802
        if self._edit():
            return INVALID_VALUE
        clone._obj.value = next(self.handles)
        self.graphs[clone._obj.value] = self.graphs[graph.value].copy(self.handles)
        return SUCCESS

    def cuGraphDestroy(self, graph: Any) -> int:  # noqa: N802
        del self.graphs[graph.value]
        return SUCCESS

    def cuGraphNodeFindInClone(self, found: Any, node: Any, clone: Any) -> int:  # noqa: N802
        found._obj.value = self.graphs[clone.value].originals[node.value]
        return SUCCESS

    def cuGraphNodeGetType(self, node: Any, kind: Any) -> int:  # noqa: N802
        kind._obj.value = HOST_CALL if node.value in self._graph_of(node.value).others else KERNEL
        return SUCCESS

    def cuGraphNodeGetDependencies_v2(self, node: Any, nodes: Any, edges: Any, count: Any) -> int:  # noqa: N802
        found = {a: kind for (a, b), kind in self._graph_of(node.value).edges.items() if b == node.value}
        return self._answer(found, nodes, edges, count)

    def cuGraphNodeGetDependentNodes_v2(self, node: Any, nodes: Any, edges: Any, count: Any) -> int:  # noqa: N802
        found = {b: kind for (a, b), kind in self._graph_of(node.value).edges.items() if a == node.value}
        return self._answer(found, nodes, edges, count)

    def _answer(self, found: dict[int, int], nodes: Any, edges: Any, count: Any) -> int:
        count._obj.value = len(found)
        if nodes is not None:
            nodes[: len(found)], edges[: len(found)] = list(found), list(found.values())
        return SUCCESS

    def _graph_of(self, node: int) -> Nodes:
        return next(graph for graph in self.graphs.values() if node in graph.work)

    def cuGraphDestroyNode(self, node: Any) -> int:  # noqa: N802
        graph = self._graph_of(node.value)
        del graph.work[node.value]
        graph.edges = {edge: kind for edge, kind in graph.edges.items() if node.value not in edge}
        return SUCCESS

    def cuGraphAddDependencies_v2(self, graph: Any, first: Any, second: Any, kinds: Any, count: Any) -> int:  # noqa: N802
        if self._edit():
            return INVALID_VALUE
        new = dict(zip(zip(first, second, strict=True), kinds, strict=True))
        nodes = self.graphs[graph.value]
        # As the driver: one dependency between two nodes, and only kernels let others start before they have ended.
        if len(new) != count.value or new.keys() & nodes.edges.keys():
            return INVALID_VALUE
        if any(kind == EARLY and before in nodes.others for (before, _), kind in new.items()):
            return INVALID_VALUE
        nodes.edges |= new
        return SUCCESS

    def cuGraphRemoveDependencies_v2(self, graph: Any, first: Any, second: Any, kinds: Any, _: Any) -> int:  # noqa: N802
        if self._edit():
            return INVALID_VALUE
        for edge, kind in zip(zip(first, second, strict=True), kinds, strict=True):
            assert self.graphs[graph.value].edges.pop(edge) == kind
        return SUCCESS

    def _edit(self) -> int:
        self.edits_left -= 1
        return INVALID_VALUE if self.edits_left < 0 else SUCCESS

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, _: Any) -> int:  # noqa: N802
        self.instances_left -= 1
        if self.instances_left < 0:
            return INVALID_VALUE
        executable._obj.value = next(self.handles)
        self.executables[executable._obj.value] = Executable(self.graphs[graph.value])
        return SUCCESS

    def cuGraphNodeSetEnabled(self, executable: int, node: int, enabled: int) -> int:  # noqa: N802
        if self._edit():
            return INVALID_VALUE
        disabled = self.executables[executable].disabled
        assert node in self.executables[executable].work
        assert (node in disabled) == bool(enabled), "nothing to change"
        (disabled.discard if enabled else disabled.add)(node)
        return SUCCESS

    def cuGraphKernelNodeGetParams_v2(self, node: Any, params: Any) -> int:  # noqa: N802
        params._obj.grid_z = self._graph_of(node.value).depths[node.value]
        return SUCCESS

    def cuGraphKernelNodeSetParams_v2(self, node: Any, params: Any) -> int:  # noqa: N802
        self._graph_of(node.value).depths[node.value] = params._obj.grid_z
        return SUCCESS

    def cuGraphExecKernelNodeSetParams_v2(self, executable: Any, node: Any, params: Any) -> int:  # noqa: N802
        assert node.value in self.executables[executable.value].work
        self.executables[executable.value].depths[node.value] = params._obj.grid_z
        return SUCCESS

    def cuGraphExecDestroy(self, executable: Any) -> int:  # noqa: N802
        del self.executables[executable.value]
        return SUCCESS

    def cuGraphLaunch(self, executable: int, stream: int) -> int:  # noqa: N802
        assert self.streams[stream] is self.main
        self.graphs_left -= 1
        if self.graphs_left < 0:
            return INVALID_VALUE
        self.executables[executable].launch()
        return SUCCESS

    # ------------------------------------------------------------------------------------------------------- runtime

    def mem_get_info(self, *_: Any) -> tuple[int, int]:
        self.bind()
        return self.free_bytes, self.capacity

    def cudaHostRegister(self, address: int, nbytes: int, _: int) -> int:  # noqa: N802
        self.pins_left -= 1
        if self.pins_left < 0:
            self.last_error = OUT_OF_MEMORY
            return OUT_OF_MEMORY
        self._watched[address] = address + nbytes
        return SUCCESS

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.forget(address)
        return SUCCESS

    def launch(self, function: Any, grid: tuple[int, ...], args: Any, options: dict[str, Any]) -> None:
        """Run a kernel on the main stream, and note what it touches."""
        self.queue(self.main.name)
        self._stores.clear()
        self.num_launches += 1
        self.num_programs += math.prod(grid)
        if self.runs_kernels:
            function[grid](*args, **options)
        for begin, end, writes in merged(self._stores):
            self.access(self.main.name, begin, end - begin, writes, f"kernel {function.fn.__name__}")

    def note(self, addresses: Any, mask: Any, itemsize: int, writes: bool) -> None:
        """Take note of the elements that a kernel loads or stores."""
        chosen = np.sort(addresses[np.asarray(mask, bool)].ravel().astype(np.int64))
        if len(chosen):
            breaks = np.flatnonzero(np.diff(chosen) > itemsize)
            begins, ends = np.append(chosen[:1], chosen[breaks + 1]), np.append(chosen[breaks], chosen[-1:])
            self._stores += [(int(a), int(b) + itemsize, writes) for a, b in zip(begins, ends, strict=True)]


def merged(ranges: list[tuple[int, int, bool]]) -> Iterator[tuple[int, int, bool]]:
    """Join ranges that touch, of one kind."""
    for writes in (False, True):
        mine = sorted((begin, end) for begin, end, kind in ranges if kind == writes)
        for begin, end in mine:
            if begin == mine[0][0]:
                current = [begin, end]
            if begin <= current[1]:
                current[1] = max(current[1], end)
            else:
                yield (*current, writes)  # type: ignore[misc]
                current = [begin, end]
        if mine:
            yield (*current, writes)  # type: ignore[misc]


class _Launcher:
    """What `kernel[grid](...)` goes to."""

    def __init__(self, device: SimulatedCuda, function: Any) -> None:
        self._device, self._function = device, function

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self._device.run(
                lambda depth: self._device.launch(self._function, (*grid[:2], depth), args, options), grid[2], tensors
            )

        return launch


_warmed: set[tuple[object, ...]] = set()


def _once(device: SimulatedCuda, warm: Callable[..., None]) -> Callable[..., None]:
    """Have variants of a kernel run for the first tensors of a kind alone, as a process compiles them once."""

    def launch(tables: Any, tensors: Any, *rest: Any) -> None:
        made = (*(tensors if isinstance(tensors, tuple) else (tensors,)), *rest)
        key = warm, *((x.dtype, x.shape[1:]) if isinstance(x, torch.Tensor) else str(x) for x in made)
        device.runs_kernels = key not in _warmed
        try:
            warm(tables, tensors, *rest)
        finally:
            device.runs_kernels = True
        _warmed.add(key)

    return launch


@contextlib.contextmanager
def simulated_cuda(capacity: int = 64 << 20) -> Iterator[SimulatedCuda]:
    """Put a simulated device in the place of the driver, the runtime and the kernels' compiler."""
    device = SimulatedCuda(capacity)
    graph = type("CUDAGraph", (Graph,), {"device": device})
    empty, builder = torch.empty, interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def bits(pointers: Any) -> int:
        return int(pointers.get_element_ty().primitive_bitwidth)

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)  # conditions that were computed as integers
        device.note(ptrs.data, mask.data, bits(ptrs) // 8, False)
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask.data = mask.data.astype(bool)
        device.note(ptrs.data, mask.data, bits(ptrs) // 8, True)
        return store(self, ptrs, value, mask, *rest)

    ones = torch.ones

    def ordinary(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        assert device.recording is None, "memory taken while a graph is captured also serves other graphs"
        return empty(*args, **kwargs)

    def filled(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") != "cuda":
            return ones(*args, **kwargs)
        error, device.last_error = device.last_error, SUCCESS
        if error:
            raise RuntimeError(f"CUDA error: {error}")
        return ones(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_driver", lambda: device)
        patch.setattr(builder, "create_masked_load", masked_load)
        patch.setattr(builder, "create_masked_store", masked_store)
        patch.setattr(kernel, "can_launch_early", lambda _: False)
        patch.setattr(kernel, "warm", _once(device, kernel.warm))
        patch.setattr(operator, "warm_experts", _once(device, operator.warm_experts))
        for module in (kernel, expert_kernel):
            for name, function in list(vars(module).items()):
                if isinstance(function, triton.JITFunction):
                    is_launched = name in ("_tap", "_tap_experts")
                    interpreted = interpreter.InterpretedFunction(function.fn)
                    patch.setattr(module, name, _Launcher(device, interpreted) if is_launched else interpreted)
        patch.setattr(torch, "empty", ordinary)
        patch.setattr(torch, "ones", filled)
        patch.setattr(torch.cuda, "Stream", device.new_stream)
        patch.setattr(torch.cuda, "CUDAGraph", graph)
        patch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
        patch.setattr(torch.cuda, "stream", lambda *_: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda *_: device.main)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: device.main.cuda_stream, raising=False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: device.recording is not None)
        patch.setattr(torch.cuda, "mem_get_info", device.mem_get_info)
        patch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
        patch.setattr(torch.cuda, "set_device", lambda *_: None)
        patch.setattr(torch.cuda, "cudart", lambda: device)
        with language_patched_once():
            yield device
