"""Puts the taps into a loaded model. Runs in the worker process, before anything is profiled, compiled or captured."""

from __future__ import annotations

from typing import Any

import torch

from vllm_tap.engine.model.residual import NO_ROWS, UNKNOWN, Verdict, decide
from vllm_tap.engine.model.routing import confirm
from vllm_tap.engine.model.tap import Rows, Tap, Taps, tap, tap_experts
from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.frame.layout import ITEMSIZE
from vllm_tap.frame.routing import Routing, unknown
from vllm_tap.streams import ROUTER_STREAMS
from vllm_tap.vllm import facts
from vllm_tap.vllm import model as vllm_model
from vllm_tap.vllm.experts import Experts, find_experts, keeps_tensors, leaves_logits, read_routing


class ModelTaps:
    """All taps of a model, by stream and layer; all of them share `rows`."""

    def __init__(self, model: vllm_model.Model, device: torch.device, rows: Rows[Any]) -> None:
        self.model, self.rows = model, rows
        self.by_place: dict[tuple[str, int], Tap] = {}
        self._experts: dict[int, Experts] = {}
        self._routing: dict[int, Routing] = {}
        self.verdict: Verdict | None = None
        self._device = device
        # The norm itself, not its tapped forward: the check must not go through the tap again.
        self._final_norm = None if model.final_norm is None else model.final_norm.forward
        self._install()

    def _new(self, stream: str, layer: int, dtype: torch.dtype | None = None) -> Tap:
        new = self.by_place[stream, layer] = Tap(stream, layer, self.rows, self._device, dtype)
        return new

    def _install(self) -> None:
        model = self.model
        if model.is_first_stage and 0 in model.layers:
            _tap_entry(model.layers[0], self._new("embeddings", 0))
        for index, layer in model.layers.items():
            _tap_stream(layer, self._new("hidden_states", index))
            self._tap_experts(layer, index)
        if model.is_last_stage:
            self.by_place["hidden_states", model.num_layers - 1].keep_probe = True
            if model.final_norm is not None:
                final = self._new("final_hidden_states", model.num_layers - 1)
                final.keep_probe = True
                _tap_norm(model.final_norm, final)

    def _tap_experts(self, layer: torch.nn.Module, index: int) -> None:
        experts = find_experts(layer)
        if experts is None:
            return
        logits = self._new("router_logits", index)
        self._experts[index] = experts
        if experts.hides_choice or not hasattr(experts.router, "select_experts"):
            _tap_logits(experts, logits)
            return
        ids = self._new("expert_ids", index, smallest_integer(experts.num_experts))
        weights = self._new("expert_weights", index)
        for place in (logits, ids, weights):
            place.keep_probe = place.keep_one_probe = True
        if leaves_logits(experts):
            logits.keeps_tensors = keeps_tensors(experts)
            _tap_logits_and_choice(experts, logits)
        else:
            _tap_logits(experts, logits)
            _tap_choice(experts, ids, weights)

    @property
    def seen(self) -> bool:
        """True if a forward pass has gone through the layers, so that widths and dtypes are known."""
        return all(place.width for (stream, _), place in self.by_place.items() if stream == "hidden_states")

    def reasons(self) -> dict[str, str]:
        """Return why streams whose places exist cannot be had: {stream: reason}."""
        verdict = self.residual()
        reasons = {"hidden_states": verdict.reason} if verdict.reason else {}
        if self.model.is_last_stage and self.model.final_norm is None:
            reasons["final_hidden_states"] = "it has no norm behind its last layer, whose hidden_states are final"
        for layer, experts in self._experts.items():
            width = self.by_place["router_logits", layer].width
            if width not in (0, experts.num_logits):
                # vLLM's Transformers backend hands the weights of the chosen experts on where others hand logits on.
                reasons["router_logits"] = (
                    f"layer {layer} passes {width} numbers on where its {experts.num_logits} experts' logits would be"
                )
            if experts.hides_choice:
                reasons["expert_ids"] = reasons["expert_weights"] = (
                    f"for the experts of layer {layer}, vLLM {facts.vllm_version()} {experts.hides_choice}. Capture "
                    "router_logits; Capture.routing says how experts follow from them"
                )
        return reasons

    def routing(self) -> dict[int, Routing]:
        """Return how the router of each layer chooses, as far as the rows seen so far tell."""
        for layer, experts in self._experts.items():
            if layer not in self._routing or self._routing[layer].reason == NO_ROWS:
                self._routing[layer] = self._read_routing(layer, experts)
        return self._routing

    def _read_routing(self, layer: int, experts: Experts) -> Routing:
        stated = read_routing(experts)
        if ("expert_ids", layer) not in self.by_place:
            return stated
        places = [self.by_place[stream, layer] for stream in ROUTER_STREAMS]
        rows = [place.probe.hidden for place in places if place.probe is not None]
        found = confirm(stated, *rows) if len(rows) == len(places) else unknown(NO_ROWS)
        for place in places:
            place.keep_probe, place.probe = found.reason == NO_ROWS, None
        return found

    def residual(self) -> Verdict:
        """Decide what the layers return, once; stages without the final norm leave it to the one that has it.

        When the rows seen so far had no values in them, the next forward pass is watched instead.
        """
        if not self.model.is_last_stage:
            return UNKNOWN
        if self.verdict is None:
            last = self.by_place["hidden_states", self.model.num_layers - 1]
            final = self.by_place.get(("final_hidden_states", self.model.num_layers - 1))
            verdict = decide(last.probe, self._final_norm, None if final is None else final.probe)
            again = verdict.reason == NO_ROWS
            for place in (last, final):
                if place is not None:
                    place.keep_probe, place.probe = again, None
            if again:
                return verdict
            self.verdict = verdict
        return self.verdict


def _tap_stream(layer: torch.nn.Module, place: Tap) -> None:
    control = place.control

    def then(result: Any) -> None:
        if isinstance(result, tuple):
            hidden, residual = result[0], result[1] if len(result) > 1 else None
            same = isinstance(residual, torch.Tensor) and residual.shape == hidden.shape
            tap(hidden, residual if same else None, control)
        else:
            tap(result, None, control)

    vllm_model.tap_outputs(layer, then)


def _tap_norm(norm: torch.nn.Module, place: Tap) -> None:
    control = place.control
    vllm_model.tap_outputs(norm, lambda result: tap(result[0] if isinstance(result, tuple) else result, None, control))


def _tap_entry(layer: torch.nn.Module, place: Tap) -> None:
    control = place.control

    def then(hidden: Any, residual: Any) -> None:
        if hidden is not None:
            tap(hidden, residual, control)

    vllm_model.tap_inputs(layer, ("hidden_states", "residual"), then)


def _tap_logits(experts: Experts, place: Tap) -> None:
    control, num_logits = place.control, experts.num_logits

    def then(logits: torch.Tensor) -> None:
        # With a fused gate, the columns of the shared experts follow the routed ones.
        tap(logits[:, :num_logits] if experts.has_fused_gate else logits, None, control)

    vllm_model.tap_inputs(experts.runner, ("router_logits",), then, "_maybe_dispatch")


def _tap_choice(experts: Experts, ids: Tap, weights: Tap) -> None:
    ids_control, weights_control = ids.control, weights.control

    def then(result: Any) -> None:
        tap(result[1], None, ids_control)
        tap(result[0], None, weights_control)

    vllm_model.tap_outputs(experts.router, then, "select_experts")


def _tap_logits_and_choice(experts: Experts, logits: Tap) -> None:
    control, num_logits = logits.control, experts.num_logits

    def then(result: Any, router_logits: torch.Tensor) -> None:
        # With a fused gate, the columns of the shared experts follow the routed ones.
        routed = router_logits[:, :num_logits] if experts.has_fused_gate else router_logits
        tap_experts(routed, result[1], result[0], control)

    vllm_model.tap_outputs(experts.router, then, "select_experts", ("router_logits",))


def dtype_name(place: Tap) -> str:
    """Return the dtype of a tap's rows as descriptors write it.

    Raises:
        EngineUnsupportedError: A dtype that has no place in a block.
    """
    name = str(place.dtype).removeprefix("torch.")
    if name not in ITEMSIZE:
        raise EngineUnsupportedError(f"{place.stream}[{place.layer}] has dtype {name}; blocks carry {list(ITEMSIZE)}")
    return name


def by_shape(taps: Taps) -> dict[tuple[str, str, int], list[int]]:
    """Return the layers of each (stream, dtype, width): layers may differ, for example in their number of experts."""
    layers: dict[tuple[str, str, int], list[int]] = {}
    for (stream, layer), place in taps.items():
        layers.setdefault((stream, dtype_name(place), place.width), []).append(layer)
    return layers


def smallest_integer(num_values: int) -> torch.dtype:
    """Return the smallest integer dtype that holds 0 to num_values - 1."""
    return torch.uint8 if num_values <= 1 << 8 else torch.int16 if num_values <= 1 << 15 else torch.int32
