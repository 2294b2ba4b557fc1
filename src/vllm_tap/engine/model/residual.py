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

# The compiled model fuses add and norm and rounds once where the check rounds twice: two units in the last place of
# bfloat16 (2 ** -7) relative to the largest value. A wrong candidate was off by 0.5 and more of it on 30 families.
TOLERANCE: Final = 0.02
SEPARATION: Final = 5.0


NO_ROWS: Final = "no rows with values in them have gone through the model yet"
"""The one reason that a forward pass with real tokens cures: dummy passes may run on padding, whose rows are zero."""

Norm = Callable[..., Any]


class Verdict(NamedTuple):
    """The convention, or an empty string and the reason for refusing."""

    convention: str
    reason: str


UNKNOWN: Final = Verdict(UNDECIDED, "")
"""This stage cannot tell, and need not."""


def decide(last_layer: Probe | None, final_norm: Norm | None, final: Probe | None) -> Verdict:
    """Find the convention that makes the final norm's output come true.

    Args:
        last_layer: What the last decoder layer returned, for a few rows.
        final_norm: The model's final norm, or None if it has none.
        final: What the final norm returned for the same rows.
    """
    if last_layer is None:
        return Verdict(UNDECIDED, NO_ROWS)
    candidates = {WHOLE: last_layer.hidden}
    if last_layer.residual is not None:
        candidates[SUM] = last_layer.hidden + last_layer.residual
    if final_norm is None or final is None:
        if len(candidates) == 1:
            return Verdict(WHOLE, "")
        return Verdict(UNDECIDED, "the layers return two tensors and the model has no final norm to tell them by")
    if last_layer.hidden.shape != final.hidden.shape:
        shapes = f"{tuple(last_layer.hidden.shape)} and {tuple(final.hidden.shape)}"
        return Verdict(
            UNDECIDED, f"the layers return several streams: rows of the last layer and the final norm: {shapes}"
        )
    usable = _usable(final.hidden)
    if not usable.any():
        return Verdict(UNDECIDED, NO_ROWS)
    errors = {name: _error(final_norm, rows[usable], final.hidden[usable]) for name, rows in candidates.items()}
    best = min(errors, key=errors.__getitem__)
    others = [error for name, error in errors.items() if name != best]
    if errors[best] > TOLERANCE or any(error < max(TOLERANCE, SEPARATION * errors[best]) for error in others):
        seen = ", ".join(f"{name}: {error:.2g}" for name, error in errors.items())
        return Verdict(
            UNDECIDED,
            f"the final norm does not tell which tensor is the residual stream (relative errors: {seen})",
        )
    return Verdict(best, "")


def _usable(rows: torch.Tensor) -> torch.Tensor:
    """Tell which rows [R] have values in them."""
    return torch.isfinite(rows).all(-1) & (rows != 0).any(-1)


@torch.inference_mode()
def _error(norm: Norm, rows: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference between norm(rows) and what is expected, relative to the largest value."""
    result = norm(rows.clone())
    if isinstance(result, tuple):
        result = result[0]
    error = (result.float() - expected.float()).abs().max() / expected.float().abs().max()
    return float(error.nan_to_num(nan=torch.inf))
