"""Statement of how a router turns logits into experts and weights, from a worker to the client. Runs in both."""

from __future__ import annotations

from typing import Final

import msgspec

UNKNOWN: Final = "unknown"


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Rule by which the router of one layer chooses K of E experts by the logits of a token, and weights them.

    Each expert has a score, a function of the logits. The K experts of the highest score, or score + bias, are chosen.
    With groups (neighbouring experts, E / num_groups each) only those of the `num_chosen_groups` highest groups can be;
    a group counts as much as its highest expert, or, with a bias, as its two highest together. Weights are the scores
    of the chosen experts, without the bias; divided by their sum if `renormalized`; then times `scale`.

    A softmax over the chosen logits alone gives the same weights as one over all of them, renormalized, and is recorded
    as that.

    Attributes:
        scoring: "softmax" (over all E logits), "sigmoid", "sqrtsoftplus", or "unknown". If it is unknown, `reason` says
            why, and the other fields say nothing.
        num_chosen: K.
        renormalized: Whether the weights are divided by their sum.
        bias: What is added to each expert's score to choose, [E]; empty without a bias.
        num_groups: Groups of experts; 1 without groups.
        num_chosen_groups: Groups from which experts are chosen.
        scale: Factor of the weights.
        output_scale: Factor of what the experts return, after their weighted sum; not part of the weights.
        checked: Whether rows of this engine have confirmed it: its experts and weights are those that follow from its
            logits. Where a kernel chooses inside itself, nothing can be compared.
        reason: Why it is unknown.
    """

    scoring: str
    num_chosen: int = 0
    renormalized: bool = False
    bias: tuple[float, ...] = ()
    num_groups: int = 1
    num_chosen_groups: int = 1
    scale: float = 1.0
    output_scale: float = 1.0
    checked: bool = False
    reason: str = ""

    def __str__(self) -> str:
        """Return one line for people."""
        if self.scoring == UNKNOWN:
            return f"{UNKNOWN}: {self.reason}"
        parts = [self.scoring]
        if self.bias:
            parts.append("plus a bias to choose by")
        if self.num_groups > 1:
            rank = "their two highest experts" if self.bias else "their highest expert"
            parts.append(f"the {self.num_chosen_groups} highest of {self.num_groups} groups, by {rank}")
        parts.append(f"the {self.num_chosen} highest experts")
        parts.append("scores of the chosen" + (" over their sum" if self.renormalized else ""))
        text = ", ".join(parts) + (f", times {self.scale:g}" if self.scale != 1 else "")
        if self.output_scale != 1:
            text += f"; what the experts return, times {self.output_scale:g}"
        return text if self.checked else f"{text} (as vLLM's router states it; no rows have confirmed it)"

    __repr__ = __str__


def unknown(reason: str) -> Routing:
    """Return what is said of a router that cannot be read."""
    return Routing(scoring=UNKNOWN, reason=reason)


def summary(routing: dict[int, Routing]) -> str:
    """Return one line for all layers of a model, naming layers only where they differ."""
    runs: list[tuple[str, list[int]]] = []
    for layer in sorted(routing):
        text = str(routing[layer])
        if not runs or runs[-1][0] != text:
            runs.append((text, []))
        runs[-1][1].append(layer)
    if len(runs) == 1:
        return runs[0][0]
    return "; ".join(f"layers {layers[0]} to {layers[-1]}: {text}" for text, layers in runs)
