"""The few calls of the CUDA driver that PyTorch does not offer, through ctypes. Worker process, CUDA engines only.

Written against the driver API of CUDA 12 and 13; the `_v2` names are stable entry points of libcuda.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Sequence
from typing import Any, Final

from vllm_tap.errors import EngineUnsupportedError, TransportError

_HOST: Final = 1  # CU_MEMORYTYPE_HOST
_DEVICE: Final = 2  # CU_MEMORYTYPE_DEVICE
_OUT_OF_MEMORY: Final = 2  # CUDA_ERROR_OUT_OF_MEMORY


class _Memcpy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = [
        ("src_x", ctypes.c_size_t),
        ("src_y", ctypes.c_size_t),
        ("src_type", ctypes.c_int),
        ("src_host", ctypes.c_void_p),
        ("src_device", ctypes.c_uint64),
        ("src_array", ctypes.c_void_p),
        ("src_pitch", ctypes.c_size_t),
        ("dst_x", ctypes.c_size_t),
        ("dst_y", ctypes.c_size_t),
        ("dst_type", ctypes.c_int),
        ("dst_host", ctypes.c_void_p),
        ("dst_device", ctypes.c_uint64),
        ("dst_array", ctypes.c_void_p),
        ("dst_pitch", ctypes.c_size_t),
        ("width", ctypes.c_size_t),
        ("height", ctypes.c_size_t),
    ]


@functools.cache
def _driver() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EngineUnsupportedError(f"the CUDA driver's library cannot be loaded: {error}") from None
    library.cuMemcpyDtoHAsync_v2.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p]
    library.cuMemcpyHtoDAsync_v2.argtypes = [ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    library.cuMemcpy2DAsync_v2.argtypes = [ctypes.POINTER(_Memcpy2D), ctypes.c_void_p]
    library.cuMemAlloc_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), ctypes.c_size_t]
    library.cuMemFree_v2.argtypes = [ctypes.c_uint64]
    library.cuGraphNodeSetEnabled.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint]
    library.cuStreamGetCaptureInfo_v2.argtypes = [ctypes.c_void_p] * 6
    return library


def _check(code: int, what: str) -> None:
    if code:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        raise TransportError(f"{what} failed: {(name.value or b'error').decode()} ({code})", code=code)


def allocate(nbytes: int) -> int:
    """Return the address of fresh device memory, or 0 if there is none.

    Not from PyTorch's allocator: giving memory back to the device through it empties the engine's caches as well.
    """
    address = ctypes.c_uint64()
    code = _driver().cuMemAlloc_v2(ctypes.byref(address), nbytes)
    if code == _OUT_OF_MEMORY:
        return 0
    _check(code, "cuMemAlloc")
    return int(address.value)


def free(address: int) -> None:
    """Give device memory back; waits for the work that is queued on the device."""
    _check(_driver().cuMemFree_v2(address), "cuMemFree")


def write_words(target: int, words: Sequence[int], stream: int) -> None:
    """Queue a copy of a few int64 words to device memory; the driver keeps its own copy of them at once."""
    data = struct.pack(f"={len(words)}q", *words)
    _check(_driver().cuMemcpyHtoDAsync_v2(target, data, len(data), stream), "cuMemcpyHtoDAsync")


def copy_to_host(target: int, source: int, nbytes: int, stream: int) -> None:
    """Queue a copy from device memory to registered host memory."""
    _check(_driver().cuMemcpyDtoHAsync_v2(target, source, nbytes, stream), "cuMemcpyDtoHAsync")


def copy_planes_to_host(
    target: int, target_pitch: int, source: int, source_pitch: int, width: int, height: int, stream: int
) -> None:
    """Queue a copy of `height` pieces of `width` bytes, each `*_pitch` bytes after the one before, in one transfer."""
    # A plain copy when the pieces lie together: the copy engine then moves one long run.
    if height == 1 or source_pitch == target_pitch == width:
        copy_to_host(target, source, width * height, stream)
        return
    job = _Memcpy2D(
        src_type=_DEVICE,
        src_device=source,
        src_pitch=source_pitch,
        dst_type=_HOST,
        dst_host=target,
        dst_pitch=target_pitch,
        width=width,
        height=height,
    )
    _check(_driver().cuMemcpy2DAsync_v2(ctypes.byref(job), stream), "cuMemcpy2DAsync")


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


def set_node_enabled(graph_exec: int, node: int, enabled: bool) -> None:
    """Switch a kernel node of an instantiated graph on or off for its future launches."""
    _check(_driver().cuGraphNodeSetEnabled(graph_exec, node, int(enabled)), "cuGraphNodeSetEnabled")
