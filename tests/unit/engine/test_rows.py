"""Choosing the rows of a step, against a plain Python walk over the same batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.engine.capture.selection import CapturedRequest, Selector
from vllm_tap.vllm.runner import Batch

POSITIONS = st.one_of(
    st.sampled_from(["all", "prompt", "generated", "last"]),
    st.lists(st.integers(-12, 12), min_size=1, max_size=4).map(lambda p: tuple(sorted(set(p)))),
)
REQUEST = st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 12), st.integers(1, 12))
"""(captured, rows in this step, rows computed before, prompt length)"""


def batch_of(requests: list[tuple[bool, int, int, int]]) -> Batch:
    """Return the batch that a runner would report."""
    starts = np.concatenate(([0], np.cumsum([count for _, count, _, _ in requests]))).astype(np.int32)
    computed = np.array([before for _, _, before, _ in requests], np.int32)
    return Batch([str(i) for i in range(len(requests))], starts, computed, torch.empty(0), torch.empty(0))


def expected(requests: list[tuple[bool, int, int, int]], positions: str | tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (token, request number) of the rows that are asked for."""
    rows, token = [], 0
    for index, (captured, count, before, prompt_len) in enumerate(requests):
        for position in range(before, before + count):
            in_prompt = position < prompt_len
            if isinstance(positions, tuple):
                wanted = in_prompt and any(position == (p + prompt_len if p < 0 else p) for p in positions)
            else:
                wanted = {
                    "all": True,
                    "prompt": in_prompt,
                    "generated": not in_prompt,
                    "last": position == prompt_len - 1,
                }[positions]
            if captured and wanted:
                rows.append((token, 100 + index))
            token += 1
    return rows


@given(st.lists(REQUEST, min_size=1, max_size=6), POSITIONS)
def test_a_selection_holds_the_rows_of_a_plain_walk(
    requests: list[tuple[bool, int, int, int]], positions: str | tuple[int, ...]
) -> None:
    """Row map, sources, numbers and runs say the same, also when the same batch comes again."""
    selector = Selector(positions)
    for index, (captured, _, _, prompt_len) in enumerate(requests):
        if captured:
            selector.add(str(index), CapturedRequest(100 + index, prompt_len))
    batch = batch_of(requests)
    rows = expected(requests, positions)
    for _ in range(2):
        selection = selector.select(batch)
        if not rows:
            assert selection is None
            continue
        assert selection is not None
        assert list(zip(selection.sources.tolist(), selection.numbers.tolist(), strict=True)) == rows
        assert selection.num_rows == len(rows)
        row_map = [-1] * int(batch.starts[-1])
        for row, (token, _) in enumerate(rows):
            row_map[token] = row
        assert selection.row_map.tolist() == row_map
        walked = [(source + i, target + i) for source, target, n in selection.runs for i in range(n)]
        assert walked == [(token, row) for row, (token, _) in enumerate(rows)]
        assert not selection.is_everything or row_map == list(range(len(row_map)))
