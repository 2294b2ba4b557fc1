"""Conventions of layers, told by a norm: of rows that we know, without a model."""

from __future__ import annotations

import pytest
import torch

from vllm_tap.engine.model.residual import SUM, UNUSABLE, WHOLE, Norm, Verdict, decide
from vllm_tap.engine.model.tap import Probe

WIDTH = 64
GENERATOR = torch.Generator().manual_seed(0)


def rows(scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return random rows."""
    return (torch.randn(16, WIDTH, generator=GENERATOR) * scale).to(dtype)


def norm_of(weight: torch.Tensor) -> Norm:
    """Return a norm that computes in float32 and rounds once."""

    def norm(given: torch.Tensor) -> torch.Tensor:
        exact = given.float()
        return (exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight).to(given.dtype)

    return norm


NORM = norm_of(torch.rand(WIDTH, generator=GENERATOR) + 0.5)


def told(hidden: torch.Tensor, residual: torch.Tensor | None, stream: torch.Tensor) -> Verdict:
    """Return what is decided where the norm was given this stream, unrounded."""
    final = NORM(stream.float()).to(hidden.dtype)
    return decide(Probe(hidden, residual), [(NORM, Probe(final, None))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 0.05], ids=["as large", "twenty times smaller"])
def test_the_norm_tells_which_tensor_is_the_stream(dtype: torch.dtype, scale: float) -> None:
    """Of a large and a small second tensor; the model adds and norms before it rounds, the check rounds between."""
    hidden, residual = rows(dtype=dtype), rows(scale, dtype)
    assert told(hidden, residual, hidden).convention == WHOLE
    assert told(hidden, residual, hidden.float() + residual.float()).convention == SUM
    assert told(residual, hidden, hidden.float() + residual.float()).convention == SUM


@pytest.mark.parametrize("off", [1e-2, 1e-3, 1e-4])
def test_a_convention_that_is_hardly_off_is_told_from_one_that_is_exact(off: float) -> None:
    """As in a hybrid model whose layers add next to nothing: in float32, a ten-thousandth is a thousand roundings."""
    hidden, residual = rows(), rows(off)
    assert told(hidden, residual, hidden).convention == WHOLE
    assert told(hidden, residual, hidden + residual).convention == SUM


def test_one_percent_is_told_in_bfloat16_where_the_other_is_exact() -> None:
    """Two of its roundings are as much; but none of those is there."""
    hidden, residual = rows(dtype=torch.bfloat16), rows(0.01, torch.bfloat16)
    final = NORM(hidden)
    assert decide(Probe(hidden, residual), [(NORM, Probe(final, None))]).convention == WHOLE


def test_what_a_norm_does_not_tell_is_refused_with_the_errors() -> None:
    """A norm takes no notice of a factor: a stream and its double are the same to it."""
    hidden = rows(dtype=torch.bfloat16)
    verdict = told(hidden, hidden.clone(), hidden)
    assert not verdict.convention
    assert not verdict.wants_rows
    assert "does not tell which tensor" in verdict.reason
    assert "hidden + residual: " in verdict.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-11, 1e11])
def test_a_tensor_that_is_lost_beside_the_other_leaves_it_to_other_rows(dtype: torch.dtype, scale: float) -> None:
    """Dummy passes run on whatever lies in memory; what real ones show is another matter."""
    hidden, residual = rows(dtype=dtype), rows(scale, dtype)
    large, small = (hidden, residual) if scale < 1 else (residual, hidden)
    verdict = told(large, small, large)
    assert not verdict.convention
    assert verdict.wants_rows
    assert "does not tell which tensor" in verdict.reason


@pytest.mark.parametrize("off", [1.0, 0.01])
def test_rows_that_change_between_the_last_layer_and_the_norm_are_refused(off: float) -> None:
    """Also by little: in float32, nothing but another tensor is off by a hundredth."""
    hidden, residual = rows(), rows()
    verdict = told(hidden, residual, hidden + residual + rows(off))
    assert not verdict.convention
    assert "no tensor of the last layer, nor their sum, is what the final norm was given" in verdict.reason
    alone = told(hidden, None, hidden + rows(off))
    assert "what the last layer returns is not what the final norm was given" in alone.reason


def test_rows_without_values_tell_nothing_yet() -> None:
    """Those of padding, and those of weights that are still to come."""
    for value in (0.0, float("nan")):
        empty = torch.full((16, WIDTH), value)
        assert decide(Probe(empty, empty), [(NORM, Probe(empty, None))]) == UNUSABLE._replace(has_residual=True)
        assert decide(Probe(empty, None), [(NORM, Probe(empty, None))]).convention == WHOLE, "there is no other"


def test_without_a_norm_one_tensor_is_the_stream_and_two_are_not_told() -> None:
    """The reason says that none ran."""
    assert decide(Probe(rows(), None), []).convention == WHOLE
    assert "no norm ran behind them" in decide(Probe(rows(), rows()), []).reason


def test_of_several_norms_the_one_that_comes_true_is_the_final_one() -> None:
    """Whatever ran in between, in whatever order, or cannot be called with rows alone."""

    def other(given: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return given + residual

    hidden, residual = rows(), rows()
    final = Probe(NORM(hidden + residual), None)
    decoys = [(other, Probe(rows(), None)), (NORM, Probe(rows(), None)), (NORM, Probe(rows()[:, :8], None))]
    assert decide(Probe(hidden, residual), [*decoys, (NORM, final)]) == Verdict(SUM, "", False, True, 3)
    refused = decide(Probe(hidden, residual), decoys)
    assert not refused.convention
    assert refused.norm == -1


def test_rows_of_other_shapes_are_refused_by_them() -> None:
    """Layers of several streams, or a norm of the last rows alone."""
    verdict = decide(Probe(rows(), None), [(NORM, Probe(rows()[:4], None))])
    assert "different shapes: (16, 64) and (4, 64)" in verdict.reason
