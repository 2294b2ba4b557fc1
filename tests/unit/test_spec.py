"""What a user may ask for, and how it turns into layers and positions of a model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.errors import LayerError, SpecError
from vllm_tap.positions import Positions
from vllm_tap.spec import MISSING, NAMED_POSITIONS, Spec, nearest, resolve_layers, wanted_tokens
from vllm_tap.streams import LAYERED_FIELDS, SINGLE_FIELDS

LAYERS = st.none() | st.just("all") | st.lists(st.integers(-200, 200), min_size=1, max_size=8)
POSITIONS = st.sampled_from(NAMED_POSITIONS) | st.lists(st.integers(-300, 300), min_size=1, max_size=8)
FIELDS = st.fixed_dictionaries(
    {
        **dict.fromkeys(LAYERED_FIELDS, LAYERS),
        "embeddings": st.booleans(),
        "final_hidden_states": st.booleans(),
        "positions": POSITIONS,
        "missing": st.sampled_from(MISSING),
    }
).filter(lambda fields: any(fields[name] not in (None, False) for name in LAYERED_FIELDS + SINGLE_FIELDS))


@given(FIELDS)
def test_a_spec_survives_json(fields: dict[str, Any]) -> None:
    """A specification is equal to the one made from its own JSON text, and hashes alike."""
    spec = Spec(**fields)
    again = Spec.from_json(spec.to_json())
    assert again == spec
    assert hash(again) == hash(spec)


def test_json_has_every_field_by_its_name() -> None:
    """The JSON text is an object with the names of the constructor, so that stored files stay readable.

    Fields of later versions are there where they say something.
    """
    assert json.loads(Spec(hidden_states=[3, -1], positions="last").to_json()) == {
        "hidden_states": [3, -1],
        "router_logits": None,
        "routed_experts": None,
        "embeddings": False,
        "final_hidden_states": False,
        "positions": "last",
        "missing": "error",
    }


def test_streams_lists_what_is_asked_for() -> None:
    """`streams` names the chosen fields and no others."""
    assert Spec(router_logits="all", embeddings=True).streams == ("router_logits", "embeddings")


def test_a_spec_cannot_be_changed() -> None:
    """Assigning to a field raises."""
    with pytest.raises(AttributeError):
        Spec(hidden_states="all").positions = "last"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "captures nothing"),
        ({"positions": "last"}, "captures nothing"),
        ({"hidden_state": "all"}, "Did you mean 'hidden_states'?"),
        ({"qqq": "all"}, "Known: hidden_states"),
        ({"hidden_states": "al"}, '"all" or a list'),
        ({"hidden_states": []}, "chooses no layer"),
        ({"hidden_states": 3}, '"all" or a list'),
        ({"hidden_states": True}, '"all" or a list'),
        ({"hidden_states": {"0": 1}}, '"all" or a list'),
        ({"hidden_states": [1.5]}, "whole numbers"),
        ({"hidden_states": [True]}, "whole numbers"),
        ({"hidden_states": torch.tensor([True])}, "whole numbers"),
        ({"hidden_states": torch.tensor([1.5])}, "whole numbers"),
        ({"hidden_states": "all", "positions": [10**20]}, "whole numbers"),
        ({"embeddings": 1}, "True or False"),
        ({"hidden_states": "all", "positions": "lst"}, "Did you mean 'last'?"),
        ({"hidden_states": "all", "positions": []}, "chooses no position"),
        ({"hidden_states": "all", "positions": 3}, "a name or a list"),
        ({"hidden_states": "all", "positions": [None]}, "whole numbers"),
        ({"hidden_states": "all", "missing": "drop"}, '"error" or "skip"'),
        ({"hidden_states": "all", "missing": None}, '"error" or "skip"'),
    ],
)
def test_what_cannot_be_is_refused_with_advice(fields: dict[str, Any], says: str) -> None:
    """Unknown fields and values of the wrong kind raise `SpecError`, and the message says what would do."""
    with pytest.raises(SpecError, match=says.replace("[", r"\[").replace("?", r"\?")):
        Spec(**fields)


@pytest.mark.parametrize("text", ["[]", '"all"', "3", "null"])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    """`from_json` takes objects only."""
    with pytest.raises(SpecError, match="is an object"):
        Spec.from_json(text)


def test_numpy_integers_are_layers() -> None:
    """Whatever Python can use as an index is a layer or a position, and is kept as a plain int."""
    spec = Spec(hidden_states=[np.int64(2), np.int32(3)], positions=np.array([0]))
    assert spec == Spec(hidden_states=[2, 3], positions=[0])
    assert json.loads(spec.to_json())["hidden_states"] == [2, 3]


def test_an_array_of_layers_is_a_list_of_layers() -> None:
    """A numpy array chooses layers as a list does."""
    assert Spec(hidden_states=np.arange(2, 4)) == Spec(hidden_states=[2, 3])


def test_positions_are_sorted_and_unique() -> None:
    """The order and the repetition of positions say nothing."""
    assert Spec(hidden_states="all", positions=[5, -1, 5, 0]) == Spec(hidden_states="all", positions=[-1, 0, 5])


def test_nearest_names_one_or_lists_all() -> None:
    """A name that is close gets a hint; one that is not gets the list."""
    assert nearest("router_logit", LAYERED_FIELDS) == " Did you mean 'router_logits'?"
    assert nearest("zzz", ["a", "b"]) == " Known: a, b."


@given(st.data())
def test_layers_resolve_as_python_indices_do(data: st.DataObject) -> None:
    """A list of layers resolves to the sorted set of what indexing a list of layers would give."""
    num_layers = data.draw(st.integers(1, 100))
    chosen = data.draw(st.lists(st.integers(-num_layers, num_layers - 1), min_size=1, max_size=6))
    every = list(range(num_layers))
    assert resolve_layers("hidden_states", tuple(chosen), every, num_layers) == sorted({every[i] for i in chosen})


def test_all_and_none_resolve_without_numbers() -> None:
    """ "all" is what the model has; None is nothing."""
    assert resolve_layers("router_logits", "all", [1, 3], 4) == [1, 3]
    assert resolve_layers("router_logits", None, [1, 3], 4) == []


@pytest.mark.parametrize(
    ("layer", "available", "says"),
    [
        (4, [0, 1, 2, 3], "no layer 4: it has 4"),
        (-5, [0, 1, 2, 3], "no layer -5"),
        (0, [1, 3], "layer 0 has no experts"),
    ],
)
def test_a_layer_that_is_not_there_is_named(layer: int, available: list[int], says: str) -> None:
    """A layer outside the model, or without the stream, raises with the number as it was given."""
    with pytest.raises(LayerError, match=says) as caught:
        resolve_layers("router_logits", (layer,), available, 4)
    assert caught.value.layer == layer


def naive(positions: str | tuple[int, ...], prompt_len: int, position: int) -> bool:
    """Say for one position whether it is wanted, in the words of the documentation."""
    if positions == "all":
        return True
    if positions == "prompt":
        return position < prompt_len
    if positions == "generated":
        return position >= prompt_len
    if positions in ("last", "last_prompt"):
        return position == prompt_len - 1
    return position < prompt_len and any(
        position == (given if given >= 0 else prompt_len + given) for given in positions
    )


PIECES = st.tuples(st.integers(1, 6) | st.integers(1, 200), st.just(0) | st.integers(0, 250), st.integers(0, 60))
"""(length of the prompt, position at which the piece begins, tokens)"""


@given(
    POSITIONS.filter(lambda name: name != "last_generated") | st.lists(st.integers(-6, 6), min_size=1),
    st.lists(PIECES, max_size=40),
)
def test_wanted_tokens_follow_the_documented_rule(
    positions: str | list[int], pieces: list[tuple[int, int, int]]
) -> None:
    """Of pieces of sequences of any length, those that the documentation says, token by token."""
    spec = Spec(hidden_states="all", positions=positions)
    prompt_lens, begins, lengths = np.array(pieces, np.int32).reshape(-1, 3).T
    every = [(prompt_len, begin + i) for prompt_len, begin, length in pieces for i in range(length)]
    expected = [token for token, place in enumerate(every) if naive(spec.positions, *place)]
    starts = np.concatenate(([0], np.cumsum(lengths)))
    assert wanted_tokens(spec.positions, prompt_lens, starts, begins).tolist() == expected


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=20))
def test_the_last_generated_token_is_the_last_of_its_sequence(sequences: list[tuple[int, int]]) -> None:
    """Of whole sequences (tokens of the prompt, generated ones), one token each that generated any."""
    prompt_lens, generated = np.array(sequences, np.int64).reshape(-1, 2).T
    starts = np.concatenate(([0], np.cumsum(prompt_lens + generated)))
    expected = [int(end) - 1 for end, count in zip(starts[1:], generated, strict=True) if count]
    assert wanted_tokens("last_generated", prompt_lens, starts, np.zeros_like(prompt_lens)).tolist() == expected


def test_workers_write_what_the_last_generated_token_is_among() -> None:
    """They do not know which step is the last; all else they are told as it is asked for."""
    shipped = {name: Spec(hidden_states="all", positions=name).shipped_positions for name in NAMED_POSITIONS}
    assert shipped.pop("last_generated") == "generated"
    assert shipped.pop("last_prompt") == "last"
    assert all(name == positions for name, positions in shipped.items())
    assert Spec(hidden_states="all", positions=[3, -1]).shipped_positions == (-1, 3)


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=5), st.integers(1, 10))
def test_a_prompt_is_long_enough_if_it_has_every_position(positions: list[int], prompt_len: int) -> None:
    """The least length is that of the shortest list in which all of them are indices."""
    has_all = all(-prompt_len <= position < prompt_len for position in positions)
    assert (prompt_len >= Spec(hidden_states="all", positions=positions).least_prompt_len) == has_all


def test_expressions_travel_in_json() -> None:
    """Through a file of facts or a command line, and as plain objects."""
    spec = Spec(hidden_states=[1], positions=Positions.prompt(-8) | Positions.generated(step=16))
    assert Spec.from_json(spec.to_json()) == spec
    assert Spec(hidden_states=[1], positions={"prompt": [-8]}).positions == Positions.prompt(-8)
    with pytest.raises(SpecError, match="object of one entry"):
        Spec(hidden_states=[1], positions={})
