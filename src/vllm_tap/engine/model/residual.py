"""The output of a decoder layer: the stream itself, or a part still to be added. Decided by the model's own norm.

Runs in the worker process. vLLM's families differ: most layers return (delta, residual) whose sum is the residual
stream; some return the whole stream in the first item beside something else; some return one tensor. The model's final
norm tells them apart: applied to the true stream of the last layer, it gives the model's own final hidden states.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from vllm_tap.engine.model.tap import ADD, FIRST, Probe

SUM: Final = "hidden + residual"
WHOLE: Final = "hidden"
MODES: Final = {SUM: ADD, WHOLE: FIRST}
UNDECIDED: Final = ""

# In units of the dtype's resolution. The compiled model fuses add and norm and rounds once where the check rounds
# twice, half a unit each at most; norms in float32 add up in other orders, and some take an approximate root.
MOST_UNITS: Final = 2.5
ROUNDING: Final = 1e-4
SEPARATION: Final = 3.0
"""So many times as far off a wrong candidate is. Where the right one comes out exactly, an eighth of a unit counts."""

NO_ROWS: Final = "no rows with values in them have been seen yet"
"""The one reason that a forward pass with real tokens cures: dummy passes may run on padding, whose rows are zero."""

Norm = Callable[..., Any]


class Verdict(NamedTuple):
    """The convention, or an empty string and the reason for refusing.

    Attributes:
        wants_rows: Whether it is for want of rows.
        has_residual: Whether the layers return two tensors of which the stream could be the sum.
        norm: Index of the norm that told; -1 for none.
    """

    convention: str
    reason: str
    wants_rows: bool = False
    has_residual: bool = False
    norm: int = -1


UNKNOWN: Final = Verdict(UNDECIDED, "")
"""This stage cannot tell, and need not."""

UNUSABLE: Final = Verdict(
    UNDECIDED, "all rows that were seen to go through its final norm are zero or not finite", True
)
"""As those of padding are, or of a model whose weights are still to come."""


def decide(last_layer: Probe, norms: list[tuple[Norm, Probe]]) -> Verdict:
    """Find the convention that makes the output of a norm come true.

    Args:
        last_layer: What the last decoder layer that ran returned, for a few rows.
        norms: What may be the final norm and ran in the same forward pass, the last one first, with what it returned.
    """
    candidates = {WHOLE: last_layer.hidden}
    if last_layer.residual is not None:
        candidates[SUM] = last_layer.hidden + last_layer.residual
    has_residual = len(candidates) > 1
    if not norms:
        if not has_residual:
            return Verdict(WHOLE, "")
        return Verdict(UNDECIDED, "the layers return two tensors and no norm ran behind them to tell them by")
    verdicts = [_by(norm, candidates, last_layer, final) for norm, final in norms]
    told = next((index for index, verdict in enumerate(verdicts) if verdict.convention), -1)
    verdict = verdicts[max(told, 0)]
    if verdict == UNUSABLE and not has_residual:
        # One tensor is the stream. A decoder without what its encoder heard, as in dummy passes, may give no numbers.
        verdict = Verdict(WHOLE, "")
    return verdict._replace(has_residual=has_residual, norm=told)


def _by(norm: Norm, candidates: dict[str, torch.Tensor], last_layer: Probe, final: Probe) -> Verdict:
    if last_layer.hidden.shape != final.hidden.shape:
        shapes = f"{tuple(last_layer.hidden.shape)} and {tuple(final.hidden.shape)}"
        return Verdict(UNDECIDED, f"rows of the last layer and of the final norm have different shapes: {shapes}")
    usable = _usable(final.hidden)
    if not usable.any():
        return UNUSABLE
    errors = {name: _error(norm, rows[usable], final.hidden[usable]) for name, rows in candidates.items()}
    unit = _resolution(last_layer.hidden, last_layer.residual, final.hidden)
    best = min(errors, key=errors.__getitem__)
    others = [error for name, error in errors.items() if name != best]
    if errors[best] > MOST_UNITS * unit + ROUNDING:
        return Verdict(UNDECIDED, f"{_none_is(errors)}: something changes the rows in between")
    if any(error < SEPARATION * max(errors[best], unit / 8) for error in others):
        seen = ", ".join(f"{name}: {error:.2g}" for name, error in errors.items())
        return Verdict(
            UNDECIDED,
            f"the final norm does not tell which tensor is the residual stream (relative errors: {seen})",
            _is_lost(last_layer, usable, unit),
        )
    return Verdict(best, "")


def _is_lost(last_layer: Probe, usable: torch.Tensor, unit: float) -> bool:
    """Tell whether one tensor is lost in the rounding of the other, in all rows that are usable.

    So it is where attention, which computes nothing in a dummy pass, left large numbers that lay in its memory.
    """
    assert last_layer.residual is not None
    sizes = [tensor[usable].double().norm(dim=-1) for tensor in (last_layer.hidden, last_layer.residual)]
    return bool((torch.minimum(*sizes) < unit * torch.maximum(*sizes)).all())


def _none_is(errors: dict[str, float]) -> str:
    seen = ", ".join(f"{name}: {error:.2g}" for name, error in errors.items())
    subject = (
        "what the last layer returns is not" if len(errors) == 1 else "no tensor of the last layer, nor their sum, is"
    )
    return f"{subject} what the final norm was given (relative errors: {seen})"


def _usable(rows: torch.Tensor) -> torch.Tensor:
    """Tell which rows [R] have values in them."""
    return torch.isfinite(rows).all(-1) & (rows != 0).any(-1)


def _resolution(*tensors: torch.Tensor | None) -> float:
    """Return the distance from one to the next number of the coarsest dtype."""
    return max(torch.finfo(tensor.dtype).eps for tensor in tensors if tensor is not None)


@torch.inference_mode()
def _error(norm: Norm, rows: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the root mean square of the difference between norm(rows) and what is expected, relative to that."""
    try:
        result = norm(rows.clone())
    except (AssertionError, RuntimeError, TypeError):  # it takes more than the rows, or runs in a forward pass alone
        return float("inf")
    if isinstance(result, tuple):
        result = result[0]
    error = (result.float() - expected.float()).square().mean().sqrt() / expected.float().square().mean().sqrt()
    return float(error.nan_to_num(nan=torch.inf))
