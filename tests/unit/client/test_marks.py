"""What may be marked, and what may come back for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vllm_tap import RowsMissingError, SpecError
from vllm_tap.client import marks

OUTPUT: Any = SimpleNamespace(request_id="r", outputs=[])


@pytest.mark.parametrize("given", [None, {}, {"n": 1}, "text", object(), iter([])])
def test_parameters_of_all_samples_are_a_list(given):
    """Anything else is refused with its kind, and with the call for a single request."""
    with pytest.raises(SpecError, match=rf"got {type(given).__name__}: for one request, mark\(params, sample\)"):
        marks.require_list(given)
    marks.require_list([])
    marks.require_list((object(),))


def test_numbers_of_samples_are_plain_integers():
    """What Python takes for an index is one; workers would not read another kind of integer."""
    for given in (3, np.int64(3), np.uint8(3)):
        number = marks.sample_number(given)
        assert (type(number), number) == (int, 3)


@pytest.mark.parametrize("given", [-1, True, 1.0, "0", None, 2**31])
def test_what_is_no_place_in_a_list_is_no_sample(given):
    """The message names what came."""
    with pytest.raises(SpecError, match=f"0 or more, got {given!r}"):
        marks.sample_number(given)


def test_outputs_are_those_of_marked_samples():
    """A sample without a mark is named, with how many have one; None stands for one that is not captured."""
    assert marks.checked_outputs(iter([OUTPUT, None]), {0}) == [OUTPUT, None]
    with pytest.raises(RowsMissingError, match=r"sample 2, which was not marked.*marked 1 of 3.*mark\(params, 2\)"):
        marks.checked_outputs([OUTPUT, None, OUTPUT], {0})
    with pytest.raises(SpecError, match="sample 0 has a str"):
        marks.checked_outputs({"r": OUTPUT}, {0})
