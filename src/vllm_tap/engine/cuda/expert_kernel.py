"""The taps of experts on CUDA: router logits, expert ids and weights in one kernel. Worker process.

A kernel of a decode step costs a microsecond or two whatever it moves. Three of them between short kernels take 2.3 a
layer, one 0.8 (bench/tap_kernel.py, 8 rows, one H200); where the tensors of many layers are still there at the end of
a graph, one kernel takes them all. What it reads and writes is described in `kernel`, and besides

    sources   int64 [layers, SOURCE_WORDS]: index of the tap of a layer's logits; addresses of logits, ids and weights
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl

from vllm_tap.engine.cuda import kernel

SOURCE_WORDS: Final = 4
SOURCE_ALIGNMENT: Final = 16
"""Bytes of which the addresses in `sources` are multiples."""

_LABELS = tl.constexpr(kernel.LABELS)
_SOURCE_WORDS = tl.constexpr(SOURCE_WORDS)
_SOURCE_ALIGNMENT = tl.constexpr(SOURCE_ALIGNMENT)


@triton.jit
def _controls(header, table, index, stream):
    plane = tl.load(table + 2 * index)
    return plane, tl.load(table + 2 * index + 1), kernel.find_plane(header, stream, plane)


@triton.jit
def _has_labels(plane, mode):
    # The mode of a tap that is off has all bits set.
    return (plane >= 0) & ((mode & _LABELS) != 0)


@triton.jit
def _load(pointer, source, stride, column, live, plane, WIDTH: tl.constexpr, AHEAD: tl.constexpr):  # noqa: N803
    wanted = (live if AHEAD else live & (plane >= 0))[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + source * stride + column[None, :], mask=wanted, other=0)


@triton.jit
def _store(
    anchor,
    base,
    slot,
    column,
    x,
    live,
    plane,
    WIDTH: tl.constexpr,  # noqa: N803
    ALIGN: tl.constexpr,  # noqa: N803
    ELEMENTS: tl.constexpr,  # noqa: N803
):
    mask = (live & (plane >= 0))[:, None] & (column < WIDTH)[None, :]
    kernel.store_rows(anchor, base, slot, column, x, mask, WIDTH, ALIGN, ELEMENTS)


@triton.jit
def _moved(pointer, address):
    # Counted from a pointer, in steps of what both are multiples of: see `kernel.store_rows`.
    elements = _SOURCE_ALIGNMENT * 8 // pointer.dtype.element_ty.primitive_bitwidth
    return pointer + (address - pointer.to(tl.int64)) // _SOURCE_ALIGNMENT * elements


@triton.jit(do_not_specialize=["index", "first", "num_rows"])
def _tap_experts(
    header,
    table,
    row_map,
    counts,
    sources,
    logits_anchor,
    ids_anchor,
    weights_anchor,
    logits,
    ids,
    weights,
    index,
    first,
    num_rows,
    logits_stride,
    ids_stride,
    weights_stride,
    STREAM: tl.constexpr,  # noqa: N803
    EXPERTS: tl.constexpr,  # noqa: N803
    CHOICES: tl.constexpr,  # noqa: N803
    LOGITS_ALIGN: tl.constexpr,  # noqa: N803
    LOGITS_ELEMENTS: tl.constexpr,  # noqa: N803
    IDS_ALIGN: tl.constexpr,  # noqa: N803
    IDS_ELEMENTS: tl.constexpr,  # noqa: N803
    WEIGHTS_ALIGN: tl.constexpr,  # noqa: N803
    WEIGHTS_ELEMENTS: tl.constexpr,  # noqa: N803
    CHOSEN: tl.constexpr,  # noqa: N803
    GATHER: tl.constexpr,  # noqa: N803
    AHEAD: tl.constexpr,  # noqa: N803
    EARLY: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    EXPERTS_BLOCK: tl.constexpr,  # noqa: N803
    CHOICES_BLOCK: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
):
    header, table, row_map, counts = kernel.of_group(header, table, row_map, counts, GROUP)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert, choice = tl.arange(0, EXPERTS_BLOCK), tl.arange(0, CHOICES_BLOCK)
    there = row < num_rows
    num_tokens = tl.load(header)
    if GATHER:
        place = sources + _SOURCE_WORDS * tl.program_id(1)
        index = tl.load(place)
        logits = _moved(logits, tl.load(place + 1))
        ids = _moved(ids, tl.load(place + 2))
        weights = _moved(weights, tl.load(place + 3))
    logits_plane, logits_mode, logits_base = _controls(header, table, index, STREAM)
    ids_plane, ids_mode, ids_base = _controls(header, table, index + 1, STREAM + 1)
    weights_plane, weights_mode, weights_base = _controls(header, table, index + 2, STREAM + 2)
    token, slot, live = kernel.find_rows(row_map, first, row, there, num_tokens, CHOSEN)
    ready = there if AHEAD else live
    source = token.to(tl.int64)[:, None]
    if EARLY:
        tl.extra.cuda.gdc_wait()
    x = _load(logits, source, logits_stride, expert, ready, logits_plane, EXPERTS, AHEAD)
    y = _load(ids, source, ids_stride, choice, ready, ids_plane, CHOICES, AHEAD)
    z = _load(weights, source, weights_stride, choice, ready, weights_plane, CHOICES, AHEAD)
    _store(logits_anchor, logits_base, slot, expert, x, live, logits_plane, EXPERTS, LOGITS_ALIGN, LOGITS_ELEMENTS)
    _store(ids_anchor, ids_base, slot, choice, y, live, ids_plane, CHOICES, IDS_ALIGN, IDS_ELEMENTS)
    _store(weights_anchor, weights_base, slot, choice, z, live, weights_plane, CHOICES, WEIGHTS_ALIGN, WEIGHTS_ELEMENTS)
    has_labels = _has_labels(logits_plane, logits_mode) | _has_labels(ids_plane, ids_mode)
    if has_labels | _has_labels(weights_plane, weights_mode):
        kernel.store_labels(header, token, slot, live)
    if tl.program_id(0) == 0:
        kernel.count(counts, index, logits_plane, num_tokens)
        kernel.count(counts, index + 1, ids_plane, num_tokens)
        kernel.count(counts, index + 2, weights_plane, num_tokens)


def launch_tap_experts(
    tables: kernel.Tables,
    rows: Sequence[torch.Tensor],
    index: int,
    stream: int,
    outs: Sequence[torch.dtype],
    *,
    chosen: tuple[int, int] | None = None,
    ahead: bool = False,
    large: bool | None = None,
    sources: torch.Tensor | None = None,
    num_groups: int = 1,
) -> None:
    """Launch the kernel on the current stream.

    Args:
        tables: Of a group.
        rows: Logits [T, E], expert ids and weights [T, K]; their last axes are contiguous.
        index: Of the tap of the logits; those of ids and weights follow.
        stream: Of the logits, in `header`; ids and weights follow.
        outs: Dtypes of the rows.
        chosen, ahead, large, num_groups: As for `kernel.launch_tap`.
        sources: Of all layers that the kernel is for; `rows` are of one of them, `index` is of none then.
    """
    (num_rows, num_experts), num_choices = rows[0].shape, rows[1].shape[1]
    if not num_rows:
        return
    first = 0
    if chosen is not None:
        first, num_rows = chosen
    large = num_rows > kernel.LARGE_ROWS if large is None else large
    block = kernel.power_of_2(num_experts)
    rows_each = max(min(kernel.LARGE_BLOCK // block, kernel.MOST_ROWS), 1) if large else 1
    aligns = [
        kernel.alignment(width, out) for width, out in zip((num_experts, num_choices, num_choices), outs, strict=True)
    ]
    elements = [align // out.itemsize for align, out in zip(aligns, outs, strict=True)]
    kernel.launch(
        _tap_experts,
        (-(-num_rows // rows_each), 1 if sources is None else len(sources), num_groups),
        (
            *(tables.header, tables.table, tables.row_map, tables.counts),
            tables.header if sources is None else sources,
            *[tables.anchor(out) for out in outs],
        ),
        rows,
        (index, first, num_rows),
        {
            "STREAM": stream,
            "EXPERTS": num_experts,
            "CHOICES": num_choices,
            "LOGITS_ALIGN": aligns[0],
            "LOGITS_ELEMENTS": elements[0],
            "IDS_ALIGN": aligns[1],
            "IDS_ELEMENTS": elements[1],
            "WEIGHTS_ALIGN": aligns[2],
            "WEIGHTS_ELEMENTS": elements[2],
            "CHOSEN": chosen is not None,
            "GATHER": sources is not None,
            "AHEAD": ahead,
            "EARLY": ahead and sources is None and kernel.can_launch_early(rows[0].device),
            "ROWS": rows_each,
            "EXPERTS_BLOCK": block,
            "CHOICES_BLOCK": kernel.power_of_2(num_choices),
            "GROUP": tables.group_words,
        },
        8 if large else 4,
    )


def can_gather(rows: Sequence[torch.Tensor]) -> bool:
    """Tell whether a layer's tensors may stand in `sources`."""
    return all(tensor.data_ptr() % SOURCE_ALIGNMENT == 0 for tensor in rows)


def launch_gather_experts(
    tables: kernel.Tables,
    rows: Sequence[torch.Tensor],
    sources: torch.Tensor,
    stream: int,
    outs: Sequence[torch.dtype],
    *,
    large: bool | None = None,
    num_groups: int = 1,
) -> None:
    """Launch the kernel for all layers of `sources` on the current stream; `rows` are of one of them."""
    launch_tap_experts(tables, rows, 0, stream, outs, ahead=True, large=large, sources=sources, num_groups=num_groups)


def warm_experts(
    tables: kernel.Tables, rows: Sequence[torch.Tensor], index: int, stream: int, outs: Sequence[torch.dtype]
) -> None:
    """Compile the variants of the kernel, by launching each of them for one row while the header says idle."""
    one = [tensor[:1] for tensor in rows]
    sources = torch.tensor([[index, *(tensor.data_ptr() for tensor in one)]], device=rows[0].device)
    for large in (False, True):
        if can_gather(one):
            launch_gather_experts(tables, one, sources, stream, outs, large=large)
        launch_tap_experts(tables, one, index, stream, outs, chosen=(0, 1), large=large)
        launch_tap_experts(tables, one, index, stream, outs, ahead=True, large=large)
