"""Statements about the routers of a model, kept true when its weights change. Worker process.

Weights change in many ways (a reload, an adapter, a trainer that writes into them), and few of them pass a place where
one could listen. A bias is a tensor of the model, so it is read with each capture, and compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from vllm_tap.engine.model.residual import NO_ROWS
from vllm_tap.engine.model.routing import confirm
from vllm_tap.engine.model.tap import Taps
from vllm_tap.frame.routing import UNKNOWN, Routing, unknown
from vllm_tap.streams import ROUTER_STREAMS
from vllm_tap.vllm.experts import Experts, bias_of, read_routing

CHANGED: Final = "the bias by which its router chooses has changed while the capture was under way"

MIXED: Final = -1
"""The version of statements of one capture, which are not kept."""


class Routers:
    """Statements about the routers of all layers with experts.

    Attributes:
        version: Rises whenever a statement changes.
    """

    def __init__(self, experts: dict[int, Experts], taps: Taps) -> None:
        self._experts, self._taps = experts, taps
        self._with_bias = {layer: bias for layer, one in experts.items() if (bias := bias_of(one)) is not None}
        self._known = torch.empty(0)  # biases that have been stated
        self._routing: dict[int, Routing] = {}
        self.version = 0

    def read(self) -> dict[int, Routing]:
        """Return how the router of each layer chooses, as far as the rows seen so far tell."""
        if not self._routing:
            self._known = self.biases().cpu()
        for layer, experts in self._experts.items():
            if layer not in self._routing or self._routing[layer].reason == NO_ROWS:
                self._state(layer, self._by_probes(layer, experts))
        return self._routing

    def biases(self) -> torch.Tensor:
        """Return a copy of the biases of all layers behind one another, as they are now. No device sync."""
        found = {layer: bias_of(self._experts[layer]) for layer in self._with_bias}
        self._with_bias = {layer: bias for layer, bias in found.items() if bias is not None}
        biases = [bias.detach().float().flatten() for bias in self._with_bias.values()]
        return torch.cat(biases) if biases else torch.empty(0)

    def check(
        self, begun: torch.Tensor | None, rows_of: Callable[[int], Sequence[torch.Tensor]]
    ) -> tuple[int, dict[int, Routing]]:
        """Return the version and the statements that hold for a capture, whose rows have come.

        Biases that have changed are read again; what no rows have confirmed yet, rows of the capture may.

        Args:
            begun: Biases when its first step ran; None if none did.
            rows_of: Returns logits, ids and weights of some rows of a layer, or nothing if it has not all of them.
        """
        self.read()
        now = self.biases().cpu()
        for layer in self._differing(self._known, now):
            self._state(layer, read_routing(self._experts[layer]))
        self._known = now
        for layer in self._experts:
            self._confirm(layer, rows_of)
        mixed = [] if begun is None else self._differing(begun.cpu(), now)
        if mixed:
            return MIXED, self._routing | dict.fromkeys(mixed, unknown(CHANGED))
        return self.version, self._routing

    def _state(self, layer: int, routing: Routing) -> None:
        if self._routing.get(layer) != routing:
            self._routing[layer] = routing
            self.version += 1

    def _differing(self, before: torch.Tensor, now: torch.Tensor) -> list[int]:
        """Return the layers whose biases are not the same."""
        if torch.equal(before, now):
            return []
        sizes = [bias.numel() for bias in self._with_bias.values()]
        if before.shape != now.shape:
            return list(self._with_bias)
        pairs = zip(self._with_bias, before.split(sizes), now.split(sizes), strict=True)
        return [layer for layer, old, new in pairs if not torch.equal(old, new)]

    def _confirm(self, layer: int, rows_of: Callable[[int], Sequence[torch.Tensor]]) -> None:
        """Have rows of a capture confirm, or refute, what a router states and none have confirmed."""
        known = self._routing[layer]
        if known.checked or (known.scoring == UNKNOWN and known.reason != NO_ROWS):
            return
        rows = rows_of(layer)
        if len(rows) == len(ROUTER_STREAMS):
            found = confirm(read_routing(self._experts[layer]), *rows)
            if found.reason != NO_ROWS:
                self._state(layer, found)

    def _by_probes(self, layer: int, experts: Experts) -> Routing:
        stated = read_routing(experts)
        if ("expert_ids", layer) not in self._taps:
            return stated
        places = [self._taps[stream, layer] for stream in ROUTER_STREAMS]
        rows = [place.probe.hidden for place in places if place.probe is not None]
        found = confirm(stated, *rows) if len(rows) == len(places) else unknown(NO_ROWS)
        for place in places:
            place.keep_probe, place.probe = found.reason == NO_ROWS, None
        return found
