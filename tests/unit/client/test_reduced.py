"""One row for each sequence, and other dtypes, against plain torch on each sequence alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.reduced import made_of, with_one_row_each
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import SpecError
from vllm_tap.positions import Positions
from vllm_tap.spec import DTYPES, REDUCTIONS, Spec

PLACE = "hidden_states", 0


def output(prompt_len: int, generated: int) -> Any:
    """An output of one completion."""
    completions = [SimpleNamespace(index=0, token_ids=list(range(generated)))]
    return SimpleNamespace(request_id="r", prompt_token_ids=list(range(prompt_len)), outputs=completions)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5),
    st.sampled_from([None, *REDUCTIONS]),
    st.sampled_from([None, *DTYPES]),
    st.sampled_from(["all", "generated", Positions.prompt(3), Positions.generated(step=2)]),
    st.data(),
)
def test_rows_are_those_of_each_sequence_alone(
    lengths: list[tuple[int, int]], reduce: str | None, dtype: str | None, positions: Any, data: st.DataObject
) -> None:
    """Whatever is read at a time; labels are those of the last position; a sequence without rows has none."""
    spec = Spec(hidden_states=[0], positions=positions, reduce=reduce, dtype=dtype, missing="skip")
    sequences = Sequences([output(*each) for each in lengths], positions)
    rows = torch.randn(len(sequences.wanted), 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    source = made_of(OwnedRows({PLACE: rows}), spec, sequences)
    of_each = [rows[a:b] for a, b in zip(sequences.wanted_starts, sequences.wanted_starts[1:], strict=False)]
    if reduce is not None:
        plain = {"last": lambda part: part[-1:], "mean": lambda part: part.float().mean(0, keepdim=True)}
        plain |= {"sum": lambda part: part.float().sum(0)[None], "max": lambda part: part.float().amax(0)[None]}
        of_each = [plain[reduce](part) if len(part) else part for part in of_each]
    reduced = sequences if reduce is None else with_one_row_each(sequences)
    assert (reduced.wanted_starts[1:] - reduced.wanted_starts[:-1]).tolist() == [len(part) for part in of_each]
    last = {int(flat) for flat in sequences.wanted[sequences.wanted_starts[1:] - 1]} if len(sequences.wanted) else set()
    assert reduce is None or set(reduced.wanted.tolist()) <= last
    expected = torch.cat([part.float() for part in of_each]).to(getattr(torch, dtype or "bfloat16"))
    start = data.draw(st.integers(0, len(expected)))
    stop = data.draw(st.integers(start, len(expected)))
    assert source.rows(*PLACE, start, stop).equal(expected[start:stop])


def test_integers_stay() -> None:
    """Expert ids have no other dtype; their last row is theirs."""
    sequences = Sequences([output(3, 0), output(2, 0)], "all")
    ids = torch.arange(10, dtype=torch.uint8).view(5, 2)
    source = OwnedRows({("expert_ids", 1): ids})
    spec = Spec(routed_experts=[1], reduce="last", dtype="float16")
    assert made_of(source, spec, sequences).rows("expert_ids", 1, 0, 2).equal(ids[[2, 4]])
    cast = made_of(source, Spec(routed_experts=[1], dtype="float16"), sequences)
    assert cast.rows("expert_ids", 1, 0, 5).equal(ids)


def test_what_cannot_be_is_refused() -> None:
    """With what is known; a Spec without them is written as before."""
    with pytest.raises(SpecError, match=r"reduce='average'\) is not known\. Known: last, mean, max, sum"):
        Spec(hidden_states=[0], reduce="average")
    with pytest.raises(SpecError, match="Did you mean 'float16'"):
        Spec(hidden_states=[0], dtype="bfloat16")
    with pytest.raises(SpecError, match=r"mean.*expert ids"):
        Spec(routed_experts=[0], reduce="mean")
    spec = Spec(hidden_states=[0], reduce="mean", dtype="float32")
    assert Spec.from_json(spec.to_json()) == spec
    assert "reduce" not in Spec(hidden_states=[0]).to_json()
