"""Where the arrays of a block lie."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.errors import DescriptorError
from vllm_tap.frame.layout import CACHE_LINE, ITEMSIZE, Stream, block_bytes, layout

STREAMS = st.lists(
    st.builds(
        Stream,
        name=st.just("hidden_states"),
        dtype=st.sampled_from(sorted(ITEMSIZE)),
        width=st.integers(1, 300) | st.sampled_from([576, 4096, 7168]),
        layers=st.lists(st.integers(0, 80), max_size=5).map(tuple),
    ),
    max_size=4,
)
OFFSETS = st.integers(0, 1 << 30).map(lambda value: value * 4)
ROWS = st.integers(1, 3000)


@given(OFFSETS, ROWS, STREAMS)
def test_arrays_do_not_overlap(offset: int, num_rows: int, streams: list[Stream]) -> None:
    """Labels and streams follow one another; each ends before the next begins, the last at `end`."""
    placed = layout(offset, num_rows, streams)
    spans = [(placed.labels, placed.labels + 12 * num_rows)]
    for stream, start in zip(streams, placed.streams, strict=True):
        nbytes = len(stream.layers) * num_rows * stream.width * ITEMSIZE[stream.dtype]
        spans.append((start, start + nbytes))
    assert spans[0][0] == offset
    assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert spans[-1][1] == placed.end


@given(OFFSETS, ROWS, STREAMS)
def test_streams_start_on_rows_and_cache_lines(offset: int, num_rows: int, streams: list[Stream]) -> None:
    """A stream starts at a multiple of its row and of a cache line, counted from the start of the segment."""
    for stream, start in zip(streams, layout(offset, num_rows, streams).streams, strict=True):
        assert start % (stream.width * ITEMSIZE[stream.dtype]) == 0
        assert start % CACHE_LINE == 0


@given(OFFSETS, ROWS, STREAMS)
def test_block_bytes_is_enough_anywhere(offset: int, num_rows: int, streams: list[Stream]) -> None:
    """What is reserved holds the block wherever it starts, and not much more than the rows need."""
    reserved = block_bytes(num_rows, streams)
    assert layout(offset, num_rows, streams).end - offset <= reserved
    rows = num_rows * (12 + sum(len(stream.layers) * stream.row_bytes for stream in streams))
    assert reserved - rows == sum(stream.alignment for stream in streams)


@given(st.lists(st.tuples(OFFSETS, ROWS), min_size=1, max_size=20), STREAMS)
def test_many_blocks_are_placed_as_each_alone(blocks: list[tuple[int, int]], streams: list[Stream]) -> None:
    """Arrays of offsets and row counts give the layouts of the single blocks."""
    offsets, counts = np.array(blocks, np.int64).T
    together = layout(offsets, counts, streams)
    for number, (offset, num_rows) in enumerate(blocks):
        alone = layout(offset, num_rows, streams)
        assert int(together.labels[number]) == alone.labels
        assert [int(starts[number]) for starts in together.streams] == list(alone.streams)
        assert int(np.broadcast_to(together.end, len(blocks))[number]) == alone.end


def test_the_documented_example() -> None:
    """The example of docs/format.md: two rows of a stream of 4 bfloat16, two layers, at byte 4096."""
    placed = layout(4096, 2, [Stream("hidden_states", "bfloat16", 4, (0, 5))])
    assert placed == (4096, (4160,), 4192)


@pytest.mark.parametrize(
    ("dtype", "width", "says"),
    [("float8_e4m3fn", 8, "float8_e4m3fn"), ("", 8, "is not one of"), ("bfloat16", 0, "width 0"),
     ("bfloat16", -1, "width -1"), ("bfloat16", 1 << 24, "width")],
)  # fmt: skip
def test_rows_that_cannot_be_are_refused(dtype: str, width: int, says: str) -> None:
    """A dtype outside the closed list, or an impossible width, raises before any offset is computed."""
    with pytest.raises(DescriptorError, match=says):
        layout(0, 1, [Stream("hidden_states", dtype, width, (0,))])
