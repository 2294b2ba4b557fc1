"""Choosing the rows of a step, against a plain Python walk over the same batch."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.engine.capture.selection import Selector
from vllm_tap.positions import Positions, Tokens
from vllm_tap.spec import Choice
from vllm_tap.vllm.runner import Batch

NAMED = st.one_of(
    st.sampled_from(["all", "prompt", "generated", "last"]),
    st.lists(st.integers(-12, 12), min_size=1, max_size=4).map(lambda p: tuple(sorted(set(p)))),
)
EXPRESSIONS = st.sampled_from(
    [
        Positions.prompt(-3),
        Positions.generated(step=3) | Positions.prompt(1, 8, 2),
        Positions.prompt() - Positions.at([0, -1]),
        Positions.mask([True, False, True]) | Positions.generated(2, 5),
    ]
)
POSITIONS = st.one_of(NAMED, EXPRESSIONS)
REQUEST = st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 12), st.integers(1, 12))
"""(captured, rows in this step, rows computed before, prompt length)"""


def batch_of(requests: list[tuple[bool, int, int, int]]) -> Batch:
    """Return the batch that a runner would report."""
    starts = np.concatenate(([0], np.cumsum([count for _, count, _, _ in requests]))).astype(np.int32)
    computed = np.array([before for _, _, before, _ in requests], np.int32)
    return Batch([str(i) for i in range(len(requests))], starts, computed, torch.empty(0), torch.empty(0))


def is_wanted(positions: Choice, position: int, prompt_len: int) -> bool:
    """Tell whether a position is asked for, looking at nothing but this one."""
    if isinstance(positions, Positions):
        whole = Tokens(*(np.array([n]) for n in (position, prompt_len, 10**6, 0)))
        return bool(positions.choose(whole)[0])
    in_prompt = position < prompt_len
    if isinstance(positions, tuple):
        return in_prompt and any(position == (p + prompt_len if p < 0 else p) for p in positions)
    return {
        "all": True,
        "prompt": in_prompt,
        "generated": not in_prompt,
        "last": position == prompt_len - 1,
    }[positions]


def expected(requests: list[tuple[bool, int, int, int]], choices: list[Choice]) -> list[tuple[int, int]]:
    """Return (token, request number) of the rows that are asked for; choices of positions go round."""
    rows, token = [], 0
    for index, (captured, count, before, prompt_len) in enumerate(requests):
        for position in range(before, before + count):
            if captured and is_wanted(choices[index % len(choices)], position, prompt_len):
                rows.append((token, 100 + index))
            token += 1
    return rows


@given(st.lists(REQUEST, min_size=1, max_size=6), st.lists(POSITIONS, min_size=1, max_size=3))
def test_a_selection_holds_the_rows_of_a_plain_walk(
    requests: list[tuple[bool, int, int, int]], choices: list[Choice]
) -> None:
    """Row map, sources, numbers and runs say the same, also when the same batch comes again.

    Requests take the positions of their capture or others.
    """
    selector = Selector(choices[0])
    for index, (captured, _, _, prompt_len) in enumerate(requests):
        if captured:
            own = choices[index % len(choices)] if index % len(choices) else None
            selector.add(str(index), 100 + index, prompt_len, own)
    batch = batch_of(requests)
    rows = expected(requests, choices)
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


def test_drafts_make_generated_positions_uncertain() -> None:
    """The host counts drafts that may be rejected: an expression takes every generated token."""
    selector = Selector(Positions.generated(step=16) | Positions.prompt(0, 1), drafts=True)
    for index in range(2):
        selector.add(str(index), index, 4)
    selection = selector.select(batch_of([(True, 3, 0, 4), (True, 5, 10, 4)]))
    assert selection is not None
    assert selection.sources.tolist() == [0, 3, 4, 5, 6, 7]
