"""The few calls of the CUDA driver that PyTorch does not offer, through ctypes. Worker process, CUDA engines only.

Written against the driver API of CUDA 12 and 13; the `_v2` names are stable entry points of libcuda.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

from vllm_tap.errors import DeviceError, EngineUnsupportedError

_OUT_OF_MEMORY: Final = 2  # CUDA_ERROR_OUT_OF_MEMORY
_AUTO_FREE: Final = 1  # CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH
_NODE_PRIORITIES: Final = 8  # CUDA_GRAPH_INSTANTIATE_FLAG_USE_NODE_PRIORITY
TIMED: Final = 0  # CU_EVENT_DEFAULT
UNTIMED: Final = 2  # CU_EVENT_DISABLE_TIMING
SLEEPING: Final = 2 | 1  # CU_EVENT_BLOCKING_SYNC: who waits lets go of the processor
_KERNEL: Final = 0  # CU_GRAPH_NODE_TYPE_KERNEL
_FULL: Final = 0  # CUgraphEdgeData of a dependency that ends when all work of the first node has
_EARLY: Final = 1 | 1 << 16  # from CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC, CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


@functools.cache
def _driver() -> Any:
    try:
        library: Any = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineUnsupportedError(f"the CUDA driver's library cannot be loaded: {error}") from None
    # With the interpreter's lock held: these wait for nothing, and who lets go of the lock in a step waits until some
    # other thread of the engine has had its turn.
    brief = ctypes.PyDLL("libcuda.so.1")
    library.cuMemcpyDtoHAsync_v2 = brief.cuMemcpyDtoHAsync_v2
    library.cuMemcpyHtoDAsync_v2 = brief.cuMemcpyHtoDAsync_v2
    library.cuGraphNodeSetEnabled = brief.cuGraphNodeSetEnabled
    library.cuEventRecord, library.cuStreamWaitEvent = brief.cuEventRecord, brief.cuStreamWaitEvent
    library.cuCtxSetCurrent = brief.cuCtxSetCurrent
    library.cuEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.cuStreamWaitEvent.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    library.cuEventSynchronize.argtypes = [ctypes.c_void_p]
    library.cuMemcpyDtoHAsync_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    library.cuMemcpyHtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.cuMemAlloc_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t]
    library.cuMemFree_v2.argtypes = [ctypes.c_uint64]
    library.cuGraphNodeSetEnabled.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    library.cuGraphLaunch.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    library.cuStreamGetCaptureInfo_v2.argtypes = [ctypes.c_void_p] * 6
    return library


def check(code: int, what: str) -> None:
    """Raise what a code that the driver returned stands for, if it is an error."""
    if code:
        raise failure(code, what)


def failure(code: int, what: str) -> DeviceError:
    """Return what a code that the driver returned stands for."""
    name = ctypes.c_char_p()
    _driver().cuGetErrorName(code, ctypes.byref(name))
    return DeviceError(f"{what} failed: {(name.value or b'error').decode()} ({code})", code=code)


def current_context() -> int:
    """Return the context of the calling thread, 0 if it has none."""
    context = ctypes.c_void_p()
    check(_driver().cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    return int(context.value or 0)


def use_context(context: int) -> None:
    """Make a context that of the calling thread: without one the calls of this module fail, PyTorch's get one."""
    check(_driver().cuCtxSetCurrent(ctypes.c_void_p(context)), "cuCtxSetCurrent")


def allocate(nbytes: int) -> int:
    """Return the address of fresh device memory, or 0 if there is none.

    Not from PyTorch's allocator: giving memory back to the device through it empties the engine's caches as well.
    """
    address = ctypes.c_uint64()
    code = _driver().cuMemAlloc_v2(ctypes.byref(address), nbytes)
    if code == _OUT_OF_MEMORY:
        return 0
    check(code, "cuMemAlloc")
    return int(address.value)


def free(address: int) -> None:
    """Give device memory back; waits for the work that is queued on the device."""
    check(_driver().cuMemFree_v2(address), "cuMemFree")


def memcpy_htod(target: int, words: bytes, stream: int) -> None:
    """Queue a copy of a few words to device memory; the driver keeps its own copy of them at once."""
    check(_driver().cuMemcpyHtoDAsync_v2(target, words, len(words), stream), "cuMemcpyHtoDAsync")


def memcpy_htod_unchecked() -> Callable[[int, bytes, int, int], int]:
    """Return the driver's function behind `memcpy_htod` (target, words, number of bytes, stream), for `check`.

    For what every step does: in a step nothing is in the caches, and each function on the way costs microseconds.
    """
    function: Callable[[int, bytes, int, int], int] = _driver().cuMemcpyHtoDAsync_v2
    return function


def copy_to_host(target: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy of rows from device memory to registered host memory; a profile of copies times these alone."""
    memcpy_dtoh(target, source, nbytes, stream)


def memcpy_dtoh(target: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy of what is no rows from device memory to pinned host memory."""
    check(_driver().cuMemcpyDtoHAsync_v2(target, source, nbytes, stream), "cuMemcpyDtoHAsync")


class Event:
    """A point in the work of a stream. Kept by the driver as long as the process lives.

    In a step, where nothing of it is in the caches, PyTorch's cost two to three times as much: 29 microseconds to
    record one, 30 to wait, 46 for a new one (one H100).
    """

    def __init__(self, kind: int = UNTIMED) -> None:
        handle = ctypes.c_void_p()
        check(_driver().cuEventCreate(ctypes.byref(handle), kind), "cuEventCreate")
        self._handle = int(handle.value or 0)

    def record(self, stream: int) -> None:
        """Be the point behind what is queued on a stream."""
        check(_driver().cuEventRecord(self._handle, stream), "cuEventRecord")

    def wait(self, stream: int) -> None:
        """Keep what is queued on a stream from here on until this point has passed, wherever the event goes later."""
        check(_driver().cuStreamWaitEvent(stream, self._handle, 0), "cuStreamWaitEvent")

    def synchronize(self) -> None:
        """Wait until this point has passed."""
        check(_driver().cuEventSynchronize(self._handle), "cuEventSynchronize")

    def seconds_since(self, earlier: Event) -> float:
        """Return the time of the device's clock between two points that have passed; both events are timed."""
        milliseconds, begin, end = ctypes.c_float(), ctypes.c_void_p(earlier._handle), ctypes.c_void_p(self._handle)
        check(_driver().cuEventElapsedTime(ctypes.byref(milliseconds), begin, end), "cuEventElapsedTime")
        return milliseconds.value / 1e3


class Events:
    """Events that are recorded again and again."""

    def __init__(self, kind: int = UNTIMED) -> None:
        self._kind = kind
        self._spare: list[Event] = []

    def recorded(self, stream: int) -> Event:
        """Return an event behind what is queued on a stream."""
        event = self._spare.pop() if self._spare else Event(self._kind)
        event.record(stream)
        return event

    def give(self, event: Event) -> None:
        """Take an event back, for which nobody is going to wait any more."""
        self._spare.append(event)


def last_captured_node(stream: int) -> tuple[int, int] | None:
    """Return the graph that a capturing stream records into and the node recorded last, or None if that is not one."""
    status, capture_id = ctypes.c_int(), ctypes.c_uint64()
    graph, nodes, num_nodes = ctypes.c_void_p(), ctypes.POINTER(ctypes.c_void_p)(), ctypes.c_size_t()
    code = _driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream),
        ctypes.byref(status),
        ctypes.byref(capture_id),
        ctypes.byref(graph),
        ctypes.byref(nodes),
        ctypes.byref(num_nodes),
    )
    if code or num_nodes.value != 1 or not graph.value:
        return None
    return int(graph.value), int(nodes[0] or 0)


def can_edit_graphs() -> bool:
    """Tell whether the driver can take nodes out of graphs with programmatic dependencies (CUDA 12.3 and later)."""
    return hasattr(_driver(), "cuGraphAddDependencies_v2")


def clone_graph(graph: int) -> int:
    """Return a copy of a graph."""
    clone = ctypes.c_void_p()
    check(_driver().cuGraphClone(ctypes.byref(clone), ctypes.c_void_p(graph)), "cuGraphClone")
    return int(clone.value or 0)


def node_in_clone(node: int, clone: int) -> int:
    """Return the node of a copy that stands for a node of the graph that was copied."""
    found = ctypes.c_void_p()
    code = _driver().cuGraphNodeFindInClone(ctypes.byref(found), ctypes.c_void_p(node), ctypes.c_void_p(clone))
    check(code, "cuGraphNodeFindInClone")
    return int(found.value or 0)


def remove_node(graph: int, node: int) -> None:
    """Take a node out of a graph; what came after it comes after what came before it."""
    before, after = _before(node), _after(node)
    # The edges first: a graph in which one of the two calls has failed is still in order.
    _add_edges(
        graph,
        # What is no kernel, a copy for instance, has no programs that could let others start before it has ended.
        [(a, b, kind if _is_kernel(a) else _FULL) for a, _ in before for b, kind in after],
    )
    check(_driver().cuGraphDestroyNode(ctypes.c_void_p(node)), "cuGraphDestroyNode")


def let_next_start_early(graph: int, node: int) -> None:
    """Let the kernel after a node start as soon as the node's programs have ended.

    For a kernel whose results nothing in the graph reads, and which itself may start early: what comes after it must
    only not overwrite what it reads. The next kernel still waits for all work of what came before the node, and what
    comes after that kernel for all work of the node. A node that is not followed by a kernel and more is left alone.
    """
    before, after = _before(node), _after(node)
    if _EARLY not in (kind for _, kind in before) or len(after) != 1:
        return
    follower, kind = after[0]
    later = _after(follower)
    if kind != _FULL or not later or not _is_kernel(follower):
        return
    full = [(first, follower, _FULL) for first, _ in before] + [(node, other, _FULL) for other, _ in later]
    _add_edges(graph, full)
    _change_edges("cuGraphRemoveDependencies_v2", graph, [(node, follower, _FULL)])
    _change_edges("cuGraphAddDependencies_v2", graph, [(node, follower, _EARLY)])


def _add_edges(graph: int, edges: Sequence[tuple[int, int, int]]) -> None:
    """Add edges; of those between two nodes the one stays that waits for more: the driver refuses a second one."""
    there = {(first, second): kind for first in {edge[0] for edge in edges} for second, kind in _after(first)}
    new: dict[tuple[int, int], int] = {}
    for first, second, kind in edges:
        if _FULL not in (there.get((first, second)), new.get((first, second))):
            new[first, second] = kind
    weaker = [(*pair, there[pair]) for pair, kind in new.items() if pair in there and there[pair] != kind]
    if weaker:
        _change_edges("cuGraphRemoveDependencies_v2", graph, weaker)
    added = [(*pair, kind) for pair, kind in new.items() if there.get(pair) != kind]
    if added:
        _change_edges("cuGraphAddDependencies_v2", graph, added)


def _change_edges(function: str, graph: int, edges: Sequence[tuple[int, int, int]]) -> None:
    """Add or remove edges (from node, to node, data)."""
    pointers = ctypes.c_void_p * len(edges)
    code = getattr(_driver(), function)(
        ctypes.c_void_p(graph),
        pointers(*[first for first, _, _ in edges]),
        pointers(*[second for _, second, _ in edges]),
        (ctypes.c_uint64 * len(edges))(*[kind for _, _, kind in edges]),
        ctypes.c_size_t(len(edges)),
    )
    check(code, function.removesuffix("_v2"))


def _before(node: int) -> list[tuple[int, int]]:
    return _neighbours("cuGraphNodeGetDependencies_v2", node)


def _after(node: int) -> list[tuple[int, int]]:
    return _neighbours("cuGraphNodeGetDependentNodes_v2", node)


def _is_kernel(node: int) -> bool:
    kind = ctypes.c_int()
    check(_driver().cuGraphNodeGetType(ctypes.c_void_p(node), ctypes.byref(kind)), "cuGraphNodeGetType")
    return kind.value == _KERNEL


def _neighbours(function: str, node: int) -> list[tuple[int, int]]:
    """Return the nodes before or after a node, each with the data of the edge."""
    call, count = getattr(_driver(), function), ctypes.c_size_t()
    check(call(ctypes.c_void_p(node), None, None, ctypes.byref(count)), function)
    nodes, edges = (ctypes.c_void_p * count.value)(), (ctypes.c_uint64 * count.value)()
    if count.value:
        check(call(ctypes.c_void_p(node), nodes, edges, ctypes.byref(count)), function)
    return [(int(other or 0), int(edge)) for other, edge in zip(nodes, edges, strict=True)]


def instantiate(graph: int) -> int:
    """Return an executable form of a graph, made as PyTorch makes its own."""
    executable, flags = ctypes.c_void_p(), ctypes.c_ulonglong(_AUTO_FREE | _NODE_PRIORITIES)
    code = _driver().cuGraphInstantiateWithFlags(ctypes.byref(executable), ctypes.c_void_p(graph), flags)
    check(code, "cuGraphInstantiate")
    return int(executable.value or 0)


def bare_launch() -> Callable[[int, int], int]:
    """Return the driver's function that queues an executable graph (graph, stream), for `check`.

    For what steps with prompts do once for every layer.
    """
    function: Callable[[int, int], int] = _driver().cuGraphLaunch
    return function


def set_node_enabled(executable: int, node: int, enabled: bool) -> None:
    """Switch a kernel node of the graph that was made executable on or off for future launches."""
    check(_driver().cuGraphNodeSetEnabled(executable, node, int(enabled)), "cuGraphNodeSetEnabled")


class _KernelParams(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v2."""

    _fields_ = (
        ("func", ctypes.c_void_p),
        ("grid_x", ctypes.c_uint),
        ("grid_y", ctypes.c_uint),
        ("grid_z", ctypes.c_uint),
        ("block_x", ctypes.c_uint),
        ("block_y", ctypes.c_uint),
        ("block_z", ctypes.c_uint),
        ("shared_bytes", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kern", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def _params_with_depth(node: int, depth: int) -> _KernelParams:
    params = _KernelParams()
    code = _driver().cuGraphKernelNodeGetParams_v2(ctypes.c_void_p(node), ctypes.byref(params))
    check(code, "cuGraphKernelNodeGetParams")
    params.grid_z = depth
    return params


def set_depth(node: int, depth: int) -> None:
    """Give the grid of a kernel node so many programs along its last axis."""
    params = _params_with_depth(node, depth)
    code = _driver().cuGraphKernelNodeSetParams_v2(ctypes.c_void_p(node), ctypes.byref(params))
    check(code, "cuGraphKernelNodeSetParams")


def set_depth_of_executable(executable: int, node: int, depth: int) -> None:
    """Do the same for future launches of what was made executable of the node's graph, which stays as it is."""
    params = _params_with_depth(node, depth)
    code = _driver().cuGraphExecKernelNodeSetParams_v2(
        ctypes.c_void_p(executable), ctypes.c_void_p(node), ctypes.byref(params)
    )
    check(code, "cuGraphExecKernelNodeSetParams")


def destroy_graph(graph: int) -> None:
    """Give a graph up; executable forms of it stay."""
    check(_driver().cuGraphDestroy(ctypes.c_void_p(graph)), "cuGraphDestroy")


def destroy_executable(executable: int) -> None:
    """Give an executable graph up; if it is queued, it runs to its end first."""
    check(_driver().cuGraphExecDestroy(ctypes.c_void_p(executable)), "cuGraphExecDestroy")
