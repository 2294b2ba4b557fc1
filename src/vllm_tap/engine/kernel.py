"""The tap on CUDA: a Triton kernel that writes chosen rows to device staging or straight to pinned host memory.

Runs in the worker process. What changes from step to step lies in a small device buffer, read by address, so that a
captured graph serves idle, staged and direct capture alike:

    header    int64 [1 + 2 * streams]: tokens of the step (0 = idle); per stream, address of plane 0 and bytes per plane
    row_map   int32 [max tokens]: destination row of each token, -1 = skip
    table     int32 [taps, 2]: plane of each tap in its stream (-1 = off), and its mode
    counts    int32 [taps]: steps that went through each tap
"""

from __future__ import annotations

import functools
import math
from typing import Any, Final

import torch
import triton
import triton.language as tl

HEADER_WORDS: Final = 16
BLOCK: Final = 1024  # elements a program moves: one 16-byte access per thread of 4 warps in bfloat16
LARGE_BLOCK: Final = 4096
LABEL_BLOCK: Final = 1024
ANY_ADDRESS: Final = 1 << 40  # as large as real ones: the size of a number is part of a kernel's signature
LARGE_ROWS: Final = 512  # above this many rows a kernel is bound by bandwidth, below it by latency


@triton.jit(do_not_specialize=["index", "address", "stream"])
def _tap(
    header,
    table,
    row_map,
    counts,
    anchor,
    hidden,
    residual,
    index,
    stream,
    address,
    hidden_stride,
    residual_stride,
    WIDTH: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    ELEMENTS: tl.constexpr,  # noqa: N803
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    EXPLICIT: tl.constexpr,  # noqa: N803
    AHEAD: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    # All loads that do not need each other are issued before the first use: a decode step is bound by their latency.
    plane = tl.load(table + 2 * index)
    mode = tl.load(table + 2 * index + 1)
    num_tokens = tl.load(header)
    slot = tl.load(row_map + row)
    if EXPLICIT:  # noqa: SIM108 - decided when the kernel is compiled
        base = address
    else:
        base = tl.load(header + 1 + 2 * stream) + plane * tl.load(header + 2 + 2 * stream)
    live = (plane >= 0) & (row < num_tokens) & (slot >= 0)
    wanted = inside if AHEAD else inside & live
    if EARLY:
        # Launched while the kernel before is still running: its results are there from here on. In graphs of layer-like
        # work this takes a tap from 1.4 to 0.3-0.7 microseconds at 8 and 64 rows (bench/tap_kernel.py, one H200).
        tl.extra.cuda.gdc_wait()
    x = tl.load(hidden + row.to(tl.int64) * hidden_stride + column, mask=wanted, other=0)
    if HAS_RESIDUAL:
        y = tl.load(residual + row.to(tl.int64) * residual_stride + column, mask=wanted, other=0)
        # In float32 and rounded once, as the model's own add does.
        x = tl.where(mode == 0, x.to(tl.float32) + y.to(tl.float32), x.to(tl.float32))
    # A pointer made from a number has no known alignment and would be stored to 2 bytes at a time. Counted from a
    # pointer that is a multiple of 16, in steps of ALIGN bytes, the compiler stores as many as the rows allow.
    far = (base - anchor.to(tl.int64)) // ALIGN * ELEMENTS
    tl.store(anchor + far + slot.to(tl.int64) * WIDTH + column, x.to(anchor.dtype.element_ty), mask=inside & live)
    if (row == 0) & (tl.program_id(1) == 0):
        tl.atomic_add(counts + index, 1, mask=(plane >= 0) & (num_tokens > 0), sem="relaxed")


@triton.jit(do_not_specialize=["address", "pitch"])
def _label(header, row_map, positions, token_ids, anchor, address, pitch, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < tl.load(header)
    slot = tl.load(row_map + row, mask=inside, other=-1)
    keep = inside & (slot >= 0)
    labels = anchor + (address - anchor.to(tl.int64)) // 4
    tl.store(labels + slot, tl.load(positions + row, mask=keep, other=0).to(tl.int32), mask=keep)
    tl.store(labels + pitch + slot, tl.load(token_ids + row, mask=keep, other=0).to(tl.int32), mask=keep)


def launch_tap(
    state: Any,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    index: int,
    stream: int,
    out: torch.dtype,
    *,
    address: int = 0,
    ahead: bool = False,
    large: bool | None = None,
) -> None:
    """Launch the tap's kernel on the current stream.

    Args:
        state: A `DeviceRows`.
        hidden: Tensor [T, D]; `residual` the same or None. The last axis is contiguous.
        index: Of the tap, in `table` and `counts`.
        stream: Of the tap, in `header`.
        out: Dtype of the rows.
        address: Where plane 0 begins, instead of what the header says.
        ahead: Load rows before it is known whether they are wanted: faster for few rows, wasteful for many.
        large: Use the block size for many rows; by default as the number of rows says.
    """
    num_tokens, width = hidden.shape
    if not num_tokens:
        return
    other = hidden if residual is None else residual
    large = num_tokens > LARGE_ROWS if large is None else large
    early = ahead and _can_launch_early(hidden.device)
    align = math.gcd(width * out.itemsize, 16)
    block = min(LARGE_BLOCK if large else BLOCK, triton.next_power_of_2(width))
    _tap[(num_tokens, triton.cdiv(width, block))](
        state.header,
        state.table,
        state.row_map,
        state.counts,
        state.anchor(out),
        hidden,
        other,
        index,
        stream,
        address,
        hidden.stride(0),
        other.stride(0),
        WIDTH=width,
        ALIGN=align,
        ELEMENTS=align // out.itemsize,
        HAS_RESIDUAL=residual is not None,
        EXPLICIT=address != 0,
        AHEAD=ahead,
        EARLY=early,
        BLOCK=block,
        num_warps=8 if block > BLOCK else 4,
        **({"launch_pdl": True} if early else {}),
    )


@functools.cache
def _can_launch_early(device: torch.device) -> bool:
    """Tell whether a kernel may start before the one ahead of it has ended (compute capability 9 and later)."""
    return torch.cuda.get_device_capability(device)[0] >= 9 and hasattr(tl.extra.cuda, "gdc_wait")


def warm(
    state: Any, hidden: torch.Tensor, residual: torch.Tensor | None, index: int, stream: int, out: torch.dtype
) -> None:
    """Compile the variants of a tap's kernel, by launching each of them for one row while the header says idle."""
    for large in (False, True):
        for address, ahead in ((0, False), (ANY_ADDRESS, False), (0, True)):
            launch_tap(state, hidden[:1], residual, index, stream, out, address=address, ahead=ahead, large=large)
    labels = torch.zeros(1, dtype=torch.int64, device=hidden.device)
    launch_labels(state, labels, labels.to(torch.int32), ANY_ADDRESS, 1, 1)


def launch_labels(
    state: Any, positions: torch.Tensor, token_ids: torch.Tensor, address: int, pitch: int, num_tokens: int
) -> None:
    """Launch the kernel that gathers positions and token ids of the captured rows, as int32.

    Args:
        state: A `DeviceRows`.
        positions: Tensor [>= num_tokens]; `token_ids` the same.
        address: Where the positions go, in device or pinned memory; token ids go `pitch` elements further.
        num_tokens: Of the step.
    """
    _label[(triton.cdiv(num_tokens, LABEL_BLOCK),)](
        state.header,
        state.row_map,
        positions,
        token_ids,
        state.anchor(torch.int32),
        address,
        pitch,
        BLOCK=LABEL_BLOCK,
    )
