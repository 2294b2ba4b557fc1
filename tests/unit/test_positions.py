"""Positions: as Python's own slices and sets choose, for whole sequences and for pieces that a worker sees."""

from __future__ import annotations

import functools
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.errors import SpecError
from vllm_tap.positions import Positions, Tokens

BOUND = st.none() | st.integers(-9, 9)
STEP = st.none() | st.integers(1, 4)
LEAF = st.one_of(
    st.tuples(st.just("prompt"), BOUND, BOUND, STEP),
    st.tuples(st.just("generated"), BOUND, BOUND, STEP),
    st.tuples(st.just("tokens"), st.lists(st.integers(0, 5), min_size=1)),
    st.tuples(st.just("mask"), st.lists(st.booleans(), max_size=9)),
    st.tuples(st.just("at"), st.lists(st.integers(-9, 9), min_size=1)),
)
TREE = st.recursive(LEAF, lambda part: st.tuples(st.sampled_from("|&-"), part, part), max_leaves=4)


def built(tree: tuple[Any, ...]) -> Positions:
    """Return the expression of a drawn tree."""
    name, *rest = tree
    if name in "|&-":
        a, b = map(built, rest)
        return {"|": a | b, "&": a & b, "-": a - b}[name]
    return getattr(Positions, name)(*rest)


def expected(tree: tuple[Any, ...], token_ids: list[int], prompt_len: int) -> set[int]:
    """Return the positions that Python's slices and sets choose."""
    name, *rest = tree
    if name in "|&-":
        a, b = (expected(part, token_ids, prompt_len) for part in rest)
        return {"|": a | b, "&": a & b, "-": a - b}[name]
    everything = range(len(token_ids))
    if name == "prompt":
        return set(everything[:prompt_len][slice(*rest)])
    if name == "generated":
        return set(everything[prompt_len:][slice(*rest)])
    if name == "tokens":
        return {position for position in everything if token_ids[position] in rest[0]}
    if name == "mask":
        return {position for position, taken in enumerate(rest[0]) if taken and position < prompt_len}
    return {position % prompt_len for position in rest[0] if -prompt_len <= position < prompt_len}


SEQUENCE = st.lists(st.integers(0, 5), min_size=1, max_size=14).flatmap(
    lambda ids: st.tuples(st.just(ids), st.integers(1, len(ids)))
)


@given(TREE, st.lists(SEQUENCE, min_size=1, max_size=3))
def test_whole_sequences_are_chosen_from_as_by_slices_and_sets(tree: Any, sequences: list[Any]) -> None:
    """All sequences at once, element by element."""
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in sequences])
    prompt_lens = np.concatenate([np.full(len(ids), n) for ids, n in sequences])
    lengths = np.concatenate([np.full(len(ids), len(ids)) for ids, _ in sequences])
    token_ids = np.concatenate([ids for ids, _ in sequences])
    chosen = built(tree).choose(Tokens(positions, prompt_lens, lengths, token_ids))
    want = [position in expected(tree, ids, n) for ids, n in sequences for position in range(len(ids))]
    assert chosen.tolist() == want


@given(TREE, SEQUENCE)
def test_a_worker_takes_no_less_than_is_asked_for(tree: Any, sequence: Any) -> None:
    """Without the length and the tokens, what is certain is asked for, and what is asked for is possible."""
    ids, prompt_len = sequence
    bounds = built(tree).bounds(Tokens(np.arange(len(ids)), np.full(len(ids), prompt_len)))
    want = expected(tree, ids, prompt_len)
    assert set(np.flatnonzero(bounds.certain)) <= want <= set(np.flatnonzero(bounds.possible))
    begin = built(tree).begin
    assert all(position >= begin.of(prompt_len) for position in want)
    assert not begin.is_last_or_later or all(position >= prompt_len - 1 for position in want)
    assert built(tree).takes_generated or max(np.flatnonzero(bounds.possible), default=0) < prompt_len


@given(st.one_of(LEAF.filter(lambda leaf: leaf[0] in ("prompt", "mask", "at"))), SEQUENCE)
def test_a_worker_takes_no_more_of_the_prompt_than_is_asked_for(tree: Any, sequence: Any) -> None:
    """What depends on neither the end nor the tokens is known at once."""
    ids, prompt_len = sequence
    bounds = built(tree).bounds(Tokens(np.arange(len(ids)), np.full(len(ids), prompt_len)))
    assert set(np.flatnonzero(bounds.possible)) == expected(tree, ids, prompt_len)


def test_every_sixteenth_generated_token_is_known_while_it_is_generated() -> None:
    """An open end needs no superset."""
    tokens = Tokens(np.arange(100), np.full(100, 20))
    bounds = Positions.generated(step=16).bounds(tokens)
    assert np.flatnonzero(bounds.possible).tolist() == np.flatnonzero(bounds.certain).tolist() == [20, 36, 52, 68, 84]


@given(TREE)
def test_an_expression_is_the_same_after_a_trip(tree: Any) -> None:
    """Through JSON and pickle; equal expressions have equal hashes."""
    positions = built(tree)
    there_and_back = Positions.from_plain(json.loads(json.dumps(positions.to_plain())))
    assert there_and_back == positions == pickle.loads(pickle.dumps(positions))
    assert hash(there_and_back) == hash(positions)


NO_EXPRESSIONS: list[Any] = [
    *(7, [], {}, {"prompt": 1}, {"prompt": [1, 2, 3, 4]}, {"prompt": [1, 2, 0]}, {"prompt": [1.5]}, {"mask": [-1]}),
    *({"or": [{"prompt": []}]}, {"sub": []}, {"nothing": []}, {"tokens": []}, {"tokens": [-1]}, {"tokens": [True]}),
    {"at": ["x"]},
]


@pytest.mark.parametrize("plain", NO_EXPRESSIONS)
def test_what_is_no_expression_is_refused(plain: Any) -> None:
    """With a sentence, whatever it is."""
    with pytest.raises(SpecError, match=r"\."):
        Positions.from_plain(plain)


def test_an_expression_from_outside_is_not_endless() -> None:
    """Before Python's own limit."""
    plain: dict[str, Any] = {"prompt": []}
    for _ in range(900):
        plain = {"or": [plain, {"prompt": []}]}
    with pytest.raises(SpecError, match="within one another"):
        Positions.from_plain(plain)


@pytest.mark.parametrize(
    ("positions", "begins"),
    [
        (Positions.prompt(), (0, 0)),
        (Positions.prompt(-8), (2, 0)),
        (Positions.prompt(7) | Positions.generated(step=16), (7, 3)),
        (Positions.prompt(-1) | Positions.generated(), (9, 2)),
        (Positions.tokens([5]) & Positions.prompt(-4), (6, 0)),
        (Positions.mask([False] * 5 + [True]), (5, 3)),
        (Positions.at([6, -2]), (6, 1)),
        (Positions.generated() - Positions.generated(-1), (10, 3)),
    ],
)
def test_where_an_expression_begins_is_known_without_a_prompt(positions: Positions, begins: Any) -> None:
    """For prompts of 10 and of 3 tokens; only what begins at their last position does so for all lengths."""
    assert (positions.begin.of(10), positions.begin.of(3)) == begins
    assert positions.begin.is_last_or_later == (begins in [(9, 2), (10, 3)])


def test_a_long_chain_is_not_deep() -> None:
    """A hundred windows are one operation; brackets within brackets end at a bound, with a sentence."""
    chain = Positions.prompt(0, 1)
    for start in range(2, 200, 2):
        chain = chain | Positions.prompt(start, start + 1)
    assert Positions.from_plain(chain.to_plain()) == chain
    with pytest.raises(SpecError, match="within one another"):
        functools.reduce(lambda deep, part: part - deep, [Positions.prompt()] * 40)


def test_arguments_that_cannot_be() -> None:
    """Each is a sentence."""
    for wrong in (
        lambda: Positions.prompt(step=0),
        lambda: Positions.prompt(0.5),  # type: ignore[arg-type]
        lambda: Positions.tokens(5),  # type: ignore[arg-type]
        lambda: Positions.mask([0, 1]),  # type: ignore[list-item]
        lambda: Positions.at(5),  # type: ignore[arg-type]
    ):
        with pytest.raises(SpecError, match="Positions"):
            wrong()
    with pytest.raises(AttributeError, match="cannot be changed"):
        Positions.prompt()._form = ()
