"""The select clause against a plain Python model of it, over all combinations of its fields; and its refusals."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_tap.errors import SpecError
from vllm_tap.legacy.select import FIELDS, covering, read_select
from vllm_tap.spec import wanted_tokens

TOKENS = [5, 6, 5, 7, 5, 8]
PROMPT_LEN = 4

CHOICES: dict[str, list[Any]] = {
    "prompt": ["all"],
    "generation": ["all"],
    "prompt_tokens": [[5]],
    "prompt_positions": [[0, -1]],
    "prompt_window": [(-2, None)],
    "generation_tokens": [[5, 9]],
    "generation_positions": [[1]],
    "generation_window": [(0, 1)],
    "exclude_prompt_tokens": [[7]],
    "exclude_prompt_positions": [[-2]],
    "exclude_prompt_window": [(1, 3)],
    "exclude_generation_tokens": [[8]],
    "exclude_generation_positions": [[0]],
    "exclude_generation_window": [(1, None)],
}


def is_met(clause: dict[str, Any], prefix: str, position: int) -> bool:
    """Tell, in plain Python, whether a position is named by the includes, or by the excludes, of its phase."""
    in_prompt, token = position < PROMPT_LEN, TOKENS[position]
    phase, at = ("prompt", position) if in_prompt else ("generation", position - PROMPT_LEN)
    if not prefix and clause.get(phase) == "all":
        return True
    if token in (clause.get(f"{prefix}{phase}_tokens") or ()):
        return True
    indices = list(range(PROMPT_LEN)) if in_prompt else list(range(100))
    if at in [indices[p] for p in clause.get(f"{prefix}{phase}_positions") or ()]:
        return True
    window = clause.get(f"{prefix}{phase}_window")
    return window is not None and at in indices[slice(*window)]


def rows(clause: Any) -> list[int]:
    """Return the positions that the clause selects."""
    mask = read_select(clause).rows(np.arange(len(TOKENS)), PROMPT_LEN, np.array(TOKENS))
    return np.flatnonzero(mask).tolist()


def test_every_combination_of_fields() -> None:
    """Each of the 2 ** 14 sets of fields selects what the model says, or is refused for the reason that it has."""
    num_accepted = 0
    for given in itertools.product([False, True], repeat=len(FIELDS)):
        clause = {name: CHOICES[name][0] for name, is_given in zip(FIELDS, given, strict=True) if is_given}
        covers = {phase: any(name.startswith(phase) for name in clause) for phase in ("prompt", "generation")}
        excluded = {phase: any(name.startswith(f"exclude_{phase}") for name in clause) for phase in covers}
        if not any(covers.values()) or any(excluded[phase] and not covers[phase] for phase in covers):
            with pytest.raises(SpecError, match=r"select (excludes|includes)"):
                read_select(clause)
            continue
        num_accepted += 1
        expected = [p for p in range(6) if is_met(clause, "", p) and not is_met(clause, "exclude_", p)]
        assert rows(clause) == expected, clause
        assert set(expected) <= set(covered(clause)), clause
    assert num_accepted == (15 * 8 + 1) ** 2 - 1


def covered(clause: dict[str, Any]) -> list[int]:
    """Return the positions that the engine is asked for."""
    positions = covering([read_select(clause)])
    return wanted_tokens(positions, np.array([PROMPT_LEN]), np.array([0, 6]), np.array([0])).tolist()


@pytest.mark.parametrize("start", [-5, -4, -1, 0, 2, 4, 9])
@pytest.mark.parametrize("stop", [None, -4, -1, 0, 1, 4, 9])
def test_prompt_windows_are_half_open(start: int, stop: int | None) -> None:
    """A window of the prompt holds the positions between its bounds; negative ones count from the prompt's end."""
    first = start + PROMPT_LEN if start < 0 else start
    last = PROMPT_LEN if stop is None else stop + PROMPT_LEN if stop < 0 else stop
    assert rows({"prompt_window": (start, stop)}) == [p for p in range(PROMPT_LEN) if first <= p < last]


def test_a_position_past_the_prompt_is_its_last_with_a_warning() -> None:
    """As the redesign documents it; the engine is asked for that row, too."""
    with pytest.warns(UserWarning, match="position 9 is past the end of a prompt of 4 tokens"):
        assert rows({"prompt_positions": [9]}) == [3]
    assert covered({"prompt_positions": [9]}) == [3]


def test_no_clause_selects_everything() -> None:
    """None selects all rows of both phases."""
    assert rows(None) == list(range(6))


def test_an_object_is_read_by_its_attributes() -> None:
    """A clause may be any object with the fields; those it does not have are left out."""
    assert rows(SimpleNamespace(prompt_positions=[-1], generation="all", prompt_tokens=None)) == [3, 4, 5]


@pytest.mark.parametrize(
    ("clauses", "positions"),
    [
        ([{"prompt_positions": [-1]}], (-1,)),
        ([{"prompt_positions": [-1]}, {"prompt_positions": [2]}], (-1, 2)),
        ([{"prompt_window": (0, 2)}], "prompt"),
        ([{"generation_positions": [0]}], "generated"),
        ([{"generation": "all"}, {"prompt_positions": [0]}], "all"),
        ([None], "all"),
    ],
)
def test_the_engine_is_asked_for_no_phase_that_is_not_named(clauses: list[Any], positions: Any) -> None:
    """What cannot be selected is never written."""
    assert covering(map(read_select, clauses)) == positions


@pytest.mark.parametrize(
    ("clause", "problem"),
    [
        ({"promt": "all"}, "Did you mean 'prompt'"),
        ({"prompt": "some"}, 'prompt is "all" or left out'),
        ({"prompt_tokens": [-1]}, "numbers of 0 or more"),
        ({"generation_positions": [-1]}, "numbers of 0 or more"),
        ({"prompt_positions": 3}, "a list of numbers"),
        ({"prompt_positions": [1.5]}, "whole numbers"),
        ({"prompt_positions": [True]}, "whole numbers"),
        ({"prompt_window": (1,)}, r"\(start, stop\)"),
        ({"generation_window": "0:3"}, r"\(start, stop\)"),
        ({}, "includes no rows"),
        (object(), "a dict or an object"),
        (3, "a dict or an object"),
    ],
)
def test_clauses_that_cannot_be_are_refused(clause: Any, problem: str) -> None:
    """Every refusal says what was expected."""
    with pytest.raises(SpecError, match=problem):
        read_select(clause)
