"""Which of the rows that arrived is taken for a position: against a plain loop, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_tap.client.memory import FetchedMemory, by_calls
from vllm_tap.client.rank_rows import RankRows, RowMatcher, _is_of
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import DescriptorError, RowsMissingError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream, block_bytes, layout

STREAM = Stream("hidden_states", "int64", 1, (0,))
Row = tuple[int, int, int, int]
"""(request number, position, token id, what the row holds)."""


def output(prompt: list[int], generated: list[int]) -> Any:
    return SimpleNamespace(
        request_id="r", prompt_token_ids=prompt, outputs=[SimpleNamespace(index=0, token_ids=generated)]
    )


def rank_rows(
    steps: list[list[Row]],
    num_requests: int,
    sequences: Sequences,
    *,
    rank: int = 0,
    matcher: RowMatcher | None = None,
    requests: Sequence[messages.Request] = (),
) -> RankRows:
    """Put steps into a segment as a worker does, and read them back."""
    memory = np.zeros(sum(block_bytes(len(step), [STREAM]) + 64 for step in steps) + 1, np.uint8)
    offset, blocks = 0, []
    for step in steps:
        placed = layout(offset, len(step), [STREAM])
        columns = np.array(step, np.int64).T
        memory[placed.labels :][: 12 * len(step)].view(np.int32)[:] = columns[:3].ravel()
        memory[placed.streams[0] :][: 8 * len(step)].view(np.int64)[:] = columns[3]
        blocks.append((0, offset, len(step)))
        offset = -(-placed.end // 64) * 64
    descriptor = messages.Descriptor(
        rank=rank,
        capture_id="c",
        streams=(STREAM,),
        requests=tuple(requests) or tuple(messages.Request(f"r-{number}", number, 0) for number in range(num_requests)),
        chunks=(messages.Chunk(1, 0, len(memory), 1),),
        blocks=np.array(blocks, "<i8").tobytes(),
        byte_order="little",
        wait_seconds=0.0,
    )
    fetch = by_calls(lambda _, at, n: memory[at : at + n].tobytes())
    fetched = FetchedMemory(descriptor, descriptor.validate("c", "little"), fetch)
    return RankRows(descriptor, fetched, matcher or RowMatcher(sequences))


@st.composite
def schedules(draw: Any) -> tuple[list[Any], list[list[Row]], int]:
    """Return outputs, the steps that computed them, and the number of requests that the worker met.

    Among the rows are earlier tries of positions, rows past the end, and rows of requests without an output.
    """
    outputs, rows = [], []
    num_requests = draw(st.integers(1, 4))
    for number in range(num_requests):
        prompt = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6))
        generated = draw(st.lists(st.integers(0, 9), max_size=4))
        known = draw(st.booleans()) or number == 0
        outputs.append(output(prompt, generated) if known else None)
        tokens = prompt + generated[:-1]
        final = [(number, position, token, 0) for position, token in enumerate(tokens)]
        early = [(number, draw(st.integers(0, len(tokens) - 1)), 5, 0) for _ in range(draw(st.integers(0, 2)))]
        past = [(number, len(tokens) + draw(st.integers(0, 3)), 7, 0) for _ in range(draw(st.integers(0, 2)))]
        rows += early
        rows += draw(st.permutations(final + past))
    rows = [(*row[:3], value) for value, row in enumerate(rows, start=100)]
    cuts = sorted(draw(st.sets(st.integers(1, len(rows)), max_size=5)) | {len(rows)})
    steps = [rows[a:b] for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
    return outputs, [step for step in steps if step], num_requests


@settings(deadline=None)
@given(schedules(), st.sampled_from(["all", "prompt", "generated", "last", "last_generated", (0, -1)]))
def test_the_last_row_written_for_a_position_is_taken(schedule: Any, positions: Any) -> None:
    """Whatever the order of steps: repeated positions count as last written, rows without a place fall away."""
    outputs, steps, num_requests = schedule
    sequences = Sequences(outputs, positions)
    last = {row[:2]: row[3] for step in steps for row in step}
    flat = [
        last[sample, position]
        for sample, given_output in enumerate(outputs)
        if given_output is not None
        for position in range(
            sequences.starts[sequences.slots[sample, 0] + 1] - sequences.starts[sequences.slots[sample, 0]]
        )
    ]
    found = rank_rows(steps, num_requests, sequences).rows("hidden_states", 0, 0, len(sequences.wanted))
    assert found[:, 0].tolist() == np.array(flat, np.int64)[sequences.wanted].tolist()


def test_a_missing_row_is_named() -> None:
    """A position that nobody wrote is an error with its sample, request and position."""
    sequences = Sequences([output([1, 2, 3], [])], "all")
    with pytest.raises(RowsMissingError, match="positions 1,") as caught:
        rank_rows([[(0, 0, 1, 0), (0, 2, 3, 0)]], 1, sequences)
    assert caught.value.identity == {"sample": 0, "request_id": "r-0", "positions": [1], "rank": 0}


def test_no_row_at_all_is_an_error() -> None:
    """A rank that met no request ships nothing, and that is not taken for an empty result."""
    with pytest.raises(RowsMissingError, match="3 of 3 rows did not arrive"):
        rank_rows([], 0, Sequences([output([1, 2, 3], [])], "all"))


def test_a_row_of_another_token_is_an_error() -> None:
    """In the order of the sequence and out of it."""
    sequences = Sequences([output([1, 2], [])], "all")
    for step in ([(0, 0, 1, 0), (0, 1, 9, 0)], [(0, 1, 9, 0), (0, 0, 1, 0)]):
        with pytest.raises(RowsMissingError, match="arrived for other tokens"):
            rank_rows([step], 1, sequences)


def test_ranks_that_met_the_same_rows_are_checked_once() -> None:
    """Also where they came in other steps; each rank reads its own."""
    sequences = Sequences([output([1, 2], [3, 4])], "all")
    matcher = RowMatcher(sequences)
    rows = [(0, 1, 2, 10), (0, 0, 1, 11), (0, 2, 3, 12)]
    first = rank_rows([rows], 1, sequences, matcher=matcher)
    others = [(*row[:3], row[3] + 10) for row in rows]
    second = rank_rows([others[:1], others[1:]], 1, sequences, rank=1, matcher=matcher)
    assert second.chosen is first.chosen
    assert first.rows("hidden_states", 0, 0, 3)[:, 0].tolist() == [11, 10, 12]
    assert second.rows("hidden_states", 0, 0, 3)[:, 0].tolist() == [21, 20, 22]


def test_a_rank_that_met_other_rows_is_checked_for_itself() -> None:
    """In another order it has its own choice; with a row less, of another token or of another request it is refused."""
    sequences = Sequences([output([1, 2], []), output([1, 2], [])], "all")
    matcher = RowMatcher(sequences)
    rows = [(0, 0, 1, 10), (0, 1, 2, 11), (1, 0, 1, 12), (1, 1, 2, 13)]
    rank_rows([rows], 2, sequences, matcher=matcher)
    turned = rank_rows([rows[::-1]], 2, sequences, rank=1, matcher=matcher)
    assert turned.rows("hidden_states", 0, 0, 4)[:, 0].tolist() == [10, 11, 12, 13]
    rank_rows([rows], 2, sequences, rank=2, matcher=matcher)
    for wrong, message in (
        (rows[:3], "rank 3: 1 of 4 rows did not arrive"),
        ([*rows[:3], (1, 1, 9, 13)], "rank 3: 1 of 4 rows arrived for other tokens"),
        ([*rows[:3], (0, 1, 2, 13)], "rank 3: 1 of 4 rows did not arrive"),
    ):
        with pytest.raises(RowsMissingError, match=message):
            rank_rows([wrong], 2, sequences, rank=3, matcher=matcher)
    with pytest.raises(RowsMissingError, match="2 of 4 rows did not arrive"):
        rank_rows([rows[:2]], 1, sequences, rank=3, matcher=matcher)


@pytest.mark.parametrize(
    ("request_id", "completion", "is_taken"),
    [
        ("r", 0, True),
        ("r-7f3a", 0, True),
        ("0_r-7f3a", 0, True),
        ("1_r-7f3a", 0, False),
        ("1_r-7f3a", 1, True),
        ("rr", 0, False),
        ("s-7f3a", 0, False),
    ],
)
def test_rows_are_those_of_the_request_that_the_output_names(request_id: str, completion: int, is_taken: bool) -> None:
    """By all the names that vLLM gives it; the labels of another's would agree."""
    outputs = [SimpleNamespace(index=index, token_ids=[3]) for index in (0, 1)]
    sequences = Sequences([SimpleNamespace(request_id="r", prompt_token_ids=[1], outputs=outputs)], (0,))
    request = messages.Request(request_id, 0, completion)
    assert _is_of(request, sequences) == is_taken


@pytest.mark.parametrize("number", [-1, 1, -(2**31)])
def test_a_row_of_no_request_is_refused(number: int) -> None:
    """Numbers come from another process: none is used as an index before it is checked."""
    with pytest.raises(DescriptorError, match=f"names request {number} of 1"):
        rank_rows([[(number, 0, 1, 0)]], 1, Sequences([output([1], [])], "all"))


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=20), max_size=8))
def test_sequences_hold_the_tokens_as_they_came(prompts: list[list[int]]) -> None:
    """Prompts behind one another, and what was generated but for its last token, which never enters the model."""
    outputs = [output(prompt, [1, 2]) for prompt in prompts]
    sequences = Sequences(outputs, "all")
    assert sequences.token_ids.tolist() == [token for prompt in prompts for token in [*prompt, 1]]


def test_requests_that_share_a_mark_are_named_as_the_cause() -> None:
    """Two requests came as sample 0 and none as sample 1: the mark is what to look at, not the machine."""
    sequences = Sequences([output([1], []), output([2], [])], "all")
    twice = [messages.Request("r-0", 0, 0), messages.Request("r-1", 0, 0)]
    with pytest.raises(RowsMissingError) as caught:
        rank_rows([[(0, 0, 1, 0), (1, 0, 2, 0)]], 2, sequences, requests=twice)
    for part in ("never met", "No request came with the mark of this sample", "mark(params, 1)", "of sample 0"):
        assert part in str(caught.value)
    assert "report" not in str(caught.value)


def test_no_marked_request_at_all_is_named_as_the_cause() -> None:
    """As with marks of an older recording, which workers leave alone."""
    other = [messages.Request("r-7", 7, 0)]
    with pytest.raises(RowsMissingError, match=r"No request came with the mark of this sample.*older Recording"):
        rank_rows([[(0, 0, 1, 0)]], 1, Sequences([output([1], [])], "all"), requests=other)
