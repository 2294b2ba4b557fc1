"""One row for each sequence, and other dtypes, against plain torch on each sequence alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.reduced import made_of, to_fp8, with_one_row_each
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
    st.sampled_from([None, *DTYPES[:2]]),
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


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.floats(-9, 9, width=32)
CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


@given(
    st.lists(st.lists(FLOATS, min_size=5, max_size=5), min_size=1, max_size=6), st.sampled_from(["float32", "bfloat16"])
)
def test_fp8_is_the_nearest_number_of_e4m3(values: list[list[float]], dtype: str) -> None:
    """As torch converts it, scaled so that the largest finite element of a row becomes the largest number."""
    rows = torch.tensor(values).to(getattr(torch, dtype))
    elements, scales = to_fp8(rows)
    exact, back = rows.float(), elements.float()
    assert (elements.dtype, scales.dtype, scales.shape) == (torch.float8_e4m3fn, torch.float32, (len(rows), 1))
    finite = exact.isfinite()
    assert back.isnan().equal(~finite)
    assert back[finite].equal((exact / scales).to(torch.float8_e4m3fn).float()[finite])
    numbers = CODES.float()[~CODES.float().isnan()].double()
    scaled = (exact / scales).double()[finite]
    nearest = (scaled[:, None] - numbers).abs().amin(1)
    assert ((scaled - back[finite].double()).abs() <= nearest + 1e-12).all()
    off = (back * scales - exact).abs()[finite]
    bound = torch.maximum(exact.abs() / 16, (scales / 1024).expand_as(exact))[finite]
    assert (off <= bound * (1 + 1e-5)).all()
    for row, one in zip(exact, back, strict=True):
        largest = row[row.isfinite()].abs().amax() if row.isfinite().any() else torch.zeros(())
        if largest > 1e-35:
            assert one[row.isfinite()].abs().amax() == 448


def test_fp8_of_reduced_rows_and_of_none() -> None:
    """The scale is that of the mean; a sequence without rows has neither."""
    sequences = Sequences([output(3, 0), output(2, 0)], "all")
    rows = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    spec = Spec(hidden_states=[0], reduce="mean", dtype="fp8")
    source = made_of(OwnedRows({PLACE: rows}), spec, sequences)
    assert list(source.places) == [("hidden_states_fp8", 0), ("hidden_states_scale", 0)]
    right = to_fp8(torch.stack([rows[:3].float().mean(0), rows[3:].float().mean(0)]))
    assert source.rows("hidden_states_fp8", 0, 0, 2).view(torch.uint8).equal(right[0].view(torch.uint8))
    assert source.rows("hidden_states_scale", 0, 0, 2).equal(right[1])
    assert source.rows("hidden_states_fp8", 0, 1, 1).shape == (0, 8)
    assert source.rows("hidden_states_scale", 0, 1, 1).shape == (0, 1)


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
    with pytest.raises(SpecError, match="for hidden_states alone: leave out embeddings"):
        Spec(hidden_states=[0], embeddings=True, dtype="fp8")
    spec = Spec(hidden_states=[0], reduce="mean", dtype="float32")
    assert Spec.from_json(spec.to_json()) == spec
    assert "reduce" not in Spec(hidden_states=[0]).to_json()
