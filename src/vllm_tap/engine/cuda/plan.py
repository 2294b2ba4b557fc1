"""Plans by which rows leave a CUDA device: what goes in which copy, and what kernels are told. Worker process.

While the same requests decode, every step does the same at other addresses: what does not change is worked out once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from vllm_tap.engine.capture.selection import Selection
from vllm_tap.engine.cuda import kernel
from vllm_tap.frame.layout import LABEL_BYTES, Layout
from vllm_tap.labels import NUM_LABELS
from vllm_tap.streams import NUMBERS
from vllm_tap.vllm.runner import Batch


class Lane:
    """One stream's way into its block, and where the current step goes."""

    def __init__(self, row_bytes: int, num_planes: int, wide: bool) -> None:
        self.row_bytes, self.num_planes, self.wide = row_bytes, num_planes, wide
        self.target = 0  # address of plane 0 in the segment, where planes go one by one


class Copy(NamedTuple):
    """A run of bytes that leaves the device in one copy, counted from the start of its block."""

    begin: int
    end: int


class Plan(NamedTuple):
    """The work of a step, and of all that take the same rows and lie in the same way.

    Attributes:
        selection: The rows.
        form: The layout of the block, counted from its start.
        inputs: Addresses of the positions and the token ids.
        copies: What leaves in one copy each after the forward pass; the first begins where the block does.
        header: What the kernels read, but for addresses in the staging.
        addresses: (place in the header, number of a copy, distance from its start) of each of those.
        by_planes: Lanes whose planes leave one by one, and where they begin in the block.
        is_whole: Whether all of the block leaves in one copy.
    """

    selection: Selection
    form: Layout[int]
    inputs: tuple[int, int]
    copies: Sequence[Copy]
    header: Sequence[int]
    addresses: Sequence[tuple[int, int, int]]
    by_planes: Sequence[tuple[Lane, int]]
    is_whole: bool

    def reads(self, batch: Batch) -> bool:
        """Tell whether the positions and the token ids of another step lie in the same places."""
        return self.inputs == (batch.positions.data_ptr(), batch.token_ids.data_ptr())

    def header_for(self, sources: Sequence[int]) -> list[int]:
        """Return what the kernels read, when they write each copy to one of these addresses."""
        header = list(self.header)
        for place, copy, distance in self.addresses:
            header[place] = sources[copy] + distance
        return header


def new_plan(
    selection: Selection,
    form: Layout[int],
    batch: Batch,
    numbers: int,
    lanes: Mapping[str, Lane],
    goes_by_planes: Callable[[Lane], bool],
) -> Plan:
    """Plan a step; `numbers` is where the device has the rows' request numbers.

    Raises:
        CaptureError: The runner's positions or token ids are of another dtype than the kernel reads.
    """
    num_rows = selection.num_rows
    header = [0] * kernel.HEADER_WORDS
    header[0] = len(selection.row_map)
    inputs = kernel.label_sources(batch.positions, batch.token_ids)
    header[kernel.LABEL_PLACE : kernel.LABEL_PLACE + 2] = inputs
    header[kernel.LABEL_PLACE + 3 : kernel.LABEL_PLACE + 5] = LABEL_BYTES * num_rows, numbers
    spans = [[0, NUM_LABELS * LABEL_BYTES * num_rows]]
    addresses = [(kernel.LABEL_PLACE + 2, 0, 0)]
    by_planes: list[tuple[Lane, int]] = []
    is_cut = False  # what lies before the next stream leaves by planes
    for (name, lane), begin in zip(lanes.items(), form.streams, strict=True):
        if goes_by_planes(lane):
            by_planes.append((lane, begin))
            is_cut = True
            continue
        if is_cut:
            spans.append([begin, begin])
            is_cut = False
        spans[-1][1] = begin + lane.num_planes * num_rows * lane.row_bytes
        place = kernel.STREAM_PLACE + 2 * NUMBERS[name]
        addresses.append((place, len(spans) - 1, begin - spans[-1][0]))
        header[place + 1] = num_rows * lane.row_bytes
    copies = [Copy(*span) for span in spans]
    is_whole = len(copies) == 1 and not by_planes
    return Plan(selection, form, inputs, copies, header, addresses, by_planes, is_whole)
