"""The tap on CUDA: a Triton kernel that writes chosen rows to device staging or straight to pinned host memory.

Runs in the worker process. What changes from step to step lies in a small device buffer, read by address, so that a
captured graph serves idle, staged and direct capture alike. Of each capture that may be under way, a *group*, there is
one, `GROUP` words from the one before; programs of a graph look at theirs by the last axis of the grid:

    header    int64 [HEADER_WORDS]: tokens of the step (0 = idle); what is added to the addresses of planes; per stream,
              address of plane 0 and bytes per plane; addresses of the step's positions and token ids, of plane 0 of the
              labels, bytes per plane, and address of the request numbers of the destination rows, int32 [rows]
    row_map   int32 [tokens]: destination row of each token, -1 = skip; behind it, where that is not the same, the token
              of each destination row, by which a kernel outside graphs goes
    table     int32 [taps, 2]: plane of each tap in its stream (-1 = off), and its mode: ADD or FIRST, with LABELS for
              the tap that writes the labels as well (int32 planes: request numbers, positions, token ids)
    counts    int32 [taps]: steps that went through each tap
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import torch
import triton
import triton.language as tl

from vllm_tap.engine.model.tap import FIRST
from vllm_tap.errors import CaptureError
from vllm_tap.streams import NUMBERS

MAX_GROUPS: Final = 8
MAX_STREAMS: Final = len(NUMBERS)
STREAM_PLACE: Final = 2
LABEL_PLACE: Final = STREAM_PLACE + 2 * MAX_STREAMS
HEADER_WORDS: Final = LABEL_PLACE + 5 + 1  # even: the row map behind it starts on a multiple of 16 bytes
LABELS: Final = 2
BLOCK: Final = 1024  # elements a program moves: one 16-byte access per thread of 4 warps in bfloat16
LARGE_BLOCK: Final = 4096  # in steps of many rows; of several rows where they are short
MOST_ROWS: Final = 64  # of a program: fewer programs than multiprocessors would leave some of them idle
ANY_ADDRESS: Final = 1 << 40  # as large as real ones: the size of a number is part of a kernel's signature
LARGE_ROWS: Final = 512  # above this many rows a kernel is bound by bandwidth, below it by latency

_FIRST = tl.constexpr(FIRST)
_LABELS = tl.constexpr(LABELS)
_STREAM_PLACE = tl.constexpr(STREAM_PLACE)
_LABEL_PLACE = tl.constexpr(LABEL_PLACE)


class Tables(Protocol):
    """Tables of a group that the kernels read; see `tables`."""

    header: torch.Tensor
    table: torch.Tensor
    row_map: torch.Tensor
    counts: torch.Tensor
    group_words: int

    def anchor(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a device pointer of a dtype from which destinations are counted."""
        ...


@triton.jit
def of_group(header, table, row_map, counts, GROUP: tl.constexpr):  # noqa: N803
    """Return the tables of the group that a program is for, given those of the first."""
    group = tl.program_id(2)
    words = 2 * group * GROUP  # of 4 bytes
    return header + group * GROUP, table + words, row_map + words, counts + words


@triton.jit
def find_rows(row_map, first, row, there, num_tokens, CHOSEN: tl.constexpr):  # noqa: N803
    """Return the tokens and the destination rows of a program's rows, and which of them are wanted."""
    if CHOSEN:
        token = tl.load(row_map + first + row, mask=there, other=0)
        slot = row
        live = there & (num_tokens > 0)
    else:
        token = row
        slot = tl.load(row_map + row, mask=there, other=-1)
        live = (row < num_tokens) & (slot >= 0)
    return token, slot, live


@triton.jit
def find_plane(header, stream, plane):
    """Return the address of a plane of a stream."""
    place = header + _STREAM_PLACE + 2 * stream
    return tl.load(place) + plane * tl.load(place + 1) + tl.load(header + 1)


@triton.jit
def store_rows(
    anchor,
    base,
    slot,
    column,
    x,
    mask,
    WIDTH: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    ELEMENTS: tl.constexpr,  # noqa: N803
):
    """Store rows to a plane, in the dtype of the anchor."""
    # A pointer made from a number has no known alignment and would be stored to 2 bytes at a time. Counted from a
    # pointer that is a multiple of 16, in steps of ALIGN bytes, the compiler stores as many as the rows allow.
    far = (base - anchor.to(tl.int64)) // ALIGN * ELEMENTS
    target = anchor + far + slot.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(target, x.to(anchor.dtype.element_ty), mask=mask)


@triton.jit
def store_labels(header, token, slot, live):
    """Store the request numbers, the positions and the token ids of rows."""
    positions = tl.load(header + _LABEL_PLACE).to(tl.pointer_type(tl.int64))
    token_ids = tl.load(header + _LABEL_PLACE + 1).to(tl.pointer_type(tl.int32))
    labels = tl.load(header + _LABEL_PLACE + 2) + tl.load(header + 1)
    pitch = tl.load(header + _LABEL_PLACE + 3)
    numbers = tl.load(header + _LABEL_PLACE + 4).to(tl.pointer_type(tl.int32))
    number = tl.load(numbers + slot, mask=live, other=0)
    position = tl.load(positions + token, mask=live, other=0).to(tl.int32)
    token_id = tl.load(token_ids + token, mask=live, other=0)
    tl.store(labels.to(tl.pointer_type(tl.int32)) + slot, number, mask=live)
    tl.store((labels + pitch).to(tl.pointer_type(tl.int32)) + slot, position, mask=live)
    tl.store((labels + 2 * pitch).to(tl.pointer_type(tl.int32)) + slot, token_id, mask=live)


@triton.jit
def count(counts, index, plane, num_tokens):
    """Note that a step went through a tap that is on."""
    tl.atomic_add(counts + index, 1, mask=(plane >= 0) & (num_tokens > 0), sem="relaxed")


@triton.jit(do_not_specialize=["index", "address", "stream", "first", "num_rows"])
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
    first,
    num_rows,
    hidden_stride,
    residual_stride,
    WIDTH: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    ELEMENTS: tl.constexpr,  # noqa: N803
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    EXPLICIT: tl.constexpr,  # noqa: N803
    CHOSEN: tl.constexpr,  # noqa: N803
    AHEAD: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
):
    header, table, row_map, counts = of_group(header, table, row_map, counts, GROUP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = row < num_rows
    inside = there[:, None] & (column < WIDTH)[None, :]
    # All loads that do not need each other are issued before the first use: a decode step is bound by their latency.
    plane = tl.load(table + 2 * index)
    mode = tl.load(table + 2 * index + 1)
    num_tokens = tl.load(header)
    if EXPLICIT:  # noqa: SIM108 - decided when the kernel is compiled
        base = address
    else:
        base = find_plane(header, stream, plane)
    token, slot, live = find_rows(row_map, first, row, there, num_tokens, CHOSEN)
    live = live & (plane >= 0)
    wanted = inside if AHEAD else inside & live[:, None]
    source = token.to(tl.int64)[:, None]
    if EARLY:
        # Launched while the kernel before is still running: its results are there from here on. In graphs of layer-like
        # work this takes a tap from 1.4 to 0.3-0.7 microseconds at 8 and 64 rows (bench/tap_kernel.py, one H200).
        tl.extra.cuda.gdc_wait()
    x = tl.load(hidden + source * hidden_stride + column[None, :], mask=wanted, other=0)
    if HAS_RESIDUAL:
        y = tl.load(residual + source * residual_stride + column[None, :], mask=wanted, other=0)
        # In float32 and rounded once, as the model's own add does.
        x = tl.where((mode & _FIRST) == 0, x.to(tl.float32) + y.to(tl.float32), x.to(tl.float32))
    store_rows(anchor, base, slot, column, x, inside & live[:, None], WIDTH, ALIGN, ELEMENTS)
    if ((mode & _LABELS) != 0) & (tl.program_id(1) == 0):
        store_labels(header, token, slot, live)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        count(counts, index, plane, num_tokens)


def launch_tap(
    tables: Tables,
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    index: int,
    stream: int,
    out: torch.dtype,
    *,
    address: int = 0,
    chosen: tuple[int, int] | None = None,
    ahead: bool = False,
    large: bool | None = None,
    num_groups: int = 1,
) -> None:
    """Launch the tap's kernel on the current stream.

    Args:
        tables: Of a group.
        hidden: Tensor [T, D]; `residual` the same or None. The last axis is contiguous.
        index: Of the tap, in `table` and `counts`.
        stream: Of the tap, in `header`.
        out: Dtype of the rows.
        address: Where plane 0 begins, instead of what the header says.
        chosen: Where in `row_map` the tokens of the chosen rows stand, and how many they are: a kernel that need not
            look at the others. Without it, as in graphs, each token's destination is looked up.
        ahead: Load rows before it is known whether they are wanted: faster for few rows, wasteful for many.
        large: Use the block size for many rows; by default as the number of rows says.
        num_groups: Groups that it is for, the next ones as well.
    """
    num_rows, width = hidden.shape
    if not num_rows:
        return
    first = 0
    if chosen is not None:
        first, num_rows = chosen
    other = hidden if residual is None else residual
    large = num_rows > LARGE_ROWS if large is None else large
    align = alignment(width, out)
    most = LARGE_BLOCK if large else BLOCK
    block = min(most, power_of_2(width))
    rows = min(most // block, MOST_ROWS) if large else 1
    launch(
        _tap,
        (-(-num_rows // rows), -(-width // block), num_groups),
        (tables.header, tables.table, tables.row_map, tables.counts, tables.anchor(out)),
        (hidden, other),
        (index, stream, address, first, num_rows),
        {
            "WIDTH": width,
            "ALIGN": align,
            "ELEMENTS": align // out.itemsize,
            "HAS_RESIDUAL": residual is not None,
            "EXPLICIT": address != 0,
            "CHOSEN": chosen is not None,
            "AHEAD": ahead,
            "EARLY": ahead and can_launch_early(hidden.device),
            "ROWS": rows,
            "BLOCK": block,
            "GROUP": tables.group_words,
        },
        8 if large else 4,
    )


_compiled: dict[tuple[object, ...], Any] = {}


def launch(
    function: Any,
    grid: tuple[int, int, int],
    fixed: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    numbers: Sequence[int],
    constants: Mapping[str, int],
    num_warps: int,
) -> None:
    """Launch a tap's kernel on the current stream, with all of its arguments in order.

    What has been compiled is kept by all that Triton compiles for, and launched past its look-ups: those took more than
    half of the host's time for a tap outside graphs.

    Args:
        function: The kernel.
        grid: Of programs.
        fixed: Tensors whose place and dtype follow from the device and from the constants and dtypes of `rows`.
        rows: Tensors [T, D] that pass the tap; their strides come behind the numbers.
        numbers: That the kernel is not specialised on. With the same constants, a number fits into an int32 at every
            launch or at none.
        constants: Known when the kernel is compiled.
        num_warps: Of a program.

    Raises:
        CaptureError: The last axis of rows is not contiguous.
    """
    strides = [tensor.stride(0) for tensor in rows]
    if any(tensor.stride(1) != 1 and tensor.shape[1] > 1 for tensor in rows):
        raise CaptureError(
            f"a tap met rows of {[list(tensor.shape) for tensor in rows]} whose elements do not lie side by side, with "
            f"strides {[tensor.stride() for tensor in rows]}: they cannot be captured. Report this model."
        )
    facts = [(tensor.dtype, tensor.data_ptr() % 16) for tensor in rows]
    outs = [tensor.dtype for tensor in fixed]
    key = (function, rows[0].device, num_warps, *constants.values(), *strides, *facts, *outs)
    kernel = _compiled.get(key)
    if kernel is not None:
        kernel[grid](*fixed, *rows, *numbers, *strides, *constants.values())
        return
    early = {"launch_pdl": True} if constants["EARLY"] else {}
    arguments = *fixed, *rows, *numbers, *strides
    _compiled[key] = function[grid](*arguments, **constants, num_warps=num_warps, **early)


def power_of_2(number: int) -> int:
    """Return the smallest power of two that is not smaller; Triton's own function costs microseconds."""
    return 1 << (number - 1).bit_length()


def alignment(width: int, dtype: torch.dtype) -> int:
    """Return of how many bytes every row of a plane starts on a multiple, 16 at most."""
    return math.gcd(width * dtype.itemsize, 16)


@functools.cache
def can_launch_early(device: torch.device) -> bool:
    """Tell whether a kernel may start before the one ahead of it has ended (compute capability 9 and later)."""
    return torch.cuda.get_device_capability(device)[0] >= 9 and hasattr(tl.extra.cuda, "gdc_wait")


def warm(
    tables: Tables, hidden: torch.Tensor, residual: torch.Tensor | None, index: int, stream: int, out: torch.dtype
) -> None:
    """Compile the variants of a tap's kernel, by launching each of them for one row while the header says idle."""
    for large in (False, True):
        for address in (0, ANY_ADDRESS):
            launch_tap(tables, hidden[:1], residual, index, stream, out, address=address, chosen=(0, 1), large=large)
        launch_tap(tables, hidden[:1], residual, index, stream, out, ahead=True, large=large)


def label_sources(positions: torch.Tensor, token_ids: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of a step's positions and token ids, for the header.

    Raises:
        CaptureError: They are not int64 and int32, as the kernel reads them.
    """
    if positions.dtype is not torch.int64 or token_ids.dtype is not torch.int32:
        raise CaptureError(
            f"the runner's positions and token ids are {positions.dtype} and {token_ids.dtype}; torch.int64 and "
            "torch.int32 were expected: report this version of vLLM."
        )
    return positions.data_ptr(), token_ids.data_ptr()
