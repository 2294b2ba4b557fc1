"""How the rows of a step leave a CUDA device: what goes in which copy, and what the kernels are told. Worker process.

While the same requests decode, every step does the same at other addresses: what does not change is worked out once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm_tap.engine import kernel
from vllm_tap.engine.device_rows import STREAM_NUMBERS
from vllm_tap.engine.rows import Batch, Selection
from vllm_tap.engine.slab import ALIGNMENT, aligned
from vllm_tap.frame.layout import LABEL_BYTES, Layout
from vllm_tap.labels import NUM_LABELS


class Lane:
    """One stream's way into its block, and where the current step goes."""

    def __init__(self, row_bytes: int, num_planes: int, wide: bool) -> None:
        self.row_bytes, self.num_planes, self.wide = row_bytes, num_planes, wide
        self.target = 0  # address of plane 0 in the segment, where planes go one by one
        self.place = 0  # of the plane under way in the ring of planes


class Copy(NamedTuple):
    """A run of bytes that leaves the device in one copy, counted from the start of its block.

    `staged` is where it begins in the place of its step in the staging: there it lies as it does in the segment, modulo
    the alignment.
    """

    begin: int
    end: int
    staged: int


class Plan(NamedTuple):
    """What a step does, and with it all that take the same rows and lie in the same way.

    Attributes:
        selection: The rows.
        way: How the block lies, see `way_of`.
        copies: What leaves in one copy each after the forward pass.
        room: Bytes of the copies in the staging.
        header: What the kernels read, but for addresses in the staging.
        addresses: (place in the header, number of a copy, distance from its start) of each of those.
        by_planes: Lanes whose planes leave one by one, and where they begin in the block.
        numbers: Request numbers of the rows, which the host writes at the start of the block.
    """

    selection: Selection
    way: tuple[int, ...]
    copies: Sequence[Copy]
    room: int
    header: Sequence[int]
    addresses: Sequence[tuple[int, int, int]]
    by_planes: Sequence[tuple[Lane, int]]
    numbers: bytes

    def fits(self, selection: Selection, way: tuple[int, ...]) -> bool:
        """Tell whether another step does the same."""
        return self.selection is selection and self.way == way

    def header_for(self, sources: Sequence[int]) -> list[int]:
        """Return what the kernels read, when they write each copy to one of these addresses."""
        header = list(self.header)
        for place, copy, distance in self.addresses:
            header[place] = sources[copy] + distance
        return header


def way_of(placed: Layout[int], batch: Batch) -> tuple[int, ...]:
    """Return all that a plan depends on beside the rows: where labels come from, and how the block lies."""
    start = placed.labels
    sources = batch.positions.data_ptr(), batch.token_ids.data_ptr()
    return (*sources, start % ALIGNMENT, *[stream - start for stream in placed.streams])


def new_plan(
    selection: Selection,
    placed: Layout[int],
    batch: Batch,
    lanes: Mapping[str, Lane],
    goes_by_planes: Callable[[Lane], bool],
) -> Plan:
    """Plan a step.

    Raises:
        CaptureError: The runner's positions or token ids are of another dtype than the kernel reads.
    """
    num_rows = selection.num_rows
    header = [0] * kernel.HEADER_WORDS
    header[0] = len(selection.row_map)
    header[kernel.LABEL_PLACE : kernel.LABEL_PLACE + 2] = kernel.label_sources(batch.positions, batch.token_ids)
    header[kernel.LABEL_PLACE + 3] = LABEL_BYTES * num_rows
    # The labels come first, and in them the request numbers, which the host knows.
    spans = [[LABEL_BYTES * num_rows, NUM_LABELS * LABEL_BYTES * num_rows]]
    addresses = [(kernel.LABEL_PLACE + 2, 0, 0)]
    by_planes: list[tuple[Lane, int]] = []
    is_cut = False  # what lies before the next stream leaves by planes
    for (name, lane), start in zip(lanes.items(), placed.streams, strict=True):
        begin = start - placed.labels
        if goes_by_planes(lane):
            by_planes.append((lane, begin))
            is_cut = True
            continue
        if is_cut:
            spans.append([begin, begin])
            is_cut = False
        spans[-1][1] = begin + lane.num_planes * num_rows * lane.row_bytes
        place = 1 + 2 * STREAM_NUMBERS[name]
        addresses.append((place, len(spans) - 1, begin - spans[-1][0]))
        header[place + 1] = num_rows * lane.row_bytes
    copies, room = [], 0
    for begin, end in spans:
        phase = (placed.labels + begin) % ALIGNMENT
        copies.append(Copy(begin, end, room + phase))
        room += aligned(phase + end - begin)
    way, numbers = way_of(placed, batch), selection.numbers.tobytes()
    return Plan(selection, way, copies, room, header, addresses, by_planes, numbers)
