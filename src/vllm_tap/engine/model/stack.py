"""Puts the taps into a list of decoder layers, and into what may be the norm behind it. Worker process.

Before anything is profiled, compiled or captured: hooks that are added later never fire in compiled code.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_tap.engine.model.blocks import Addend, LayerBlocks
from vllm_tap.engine.model.residual import Norm
from vllm_tap.engine.model.tap import Rows, Tap, Taps, tap, tap_experts
from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.frame.layout import ITEMSIZE
from vllm_tap.vllm import model as vllm_model
from vllm_tap.vllm.blocks import Block, find_blocks, tap_block
from vllm_tap.vllm.decoder import Stack
from vllm_tap.vllm.experts import Experts, find_experts, keeps_tensors, leaves_logits


class StackTaps:
    """The taps of one list of layers.

    Attributes:
        by_place: All but those of norms, by stream and layer.
        layers: Those of hidden states, in order of the layers that this worker holds.
        norms: Modules that may be the norm behind the list, without their taps, and the tap of what each returns.
        experts: Those of the layers that have some, by layer.
        blocks: Those of the layers, by layer; their taps come into `by_place` when rows have told which they are.
    """

    def __init__(self, stack: Stack, model: vllm_model.Model, device: torch.device, rows: Rows[Any]) -> None:
        self.stack, self.rows, self._device = stack, rows, device
        self.by_place: dict[tuple[str, int], Tap] = {}
        self.experts: dict[int, Experts] = {}
        self.norms: list[tuple[Norm, Tap]] = []
        self.blocks: dict[int, LayerBlocks] = {}
        before: Tap | None = None
        for index, layer in stack.layers.items():
            if before is None:
                before = self._tap_entry(layer, index, model)
            behind = self._new("hidden_states", index)
            _tap_stream(layer, behind)
            self._tap_experts(layer, index)
            if not model.fuses_reduction:
                self.blocks[index] = LayerBlocks(self._tap_blocks(layer, index, model.width), before, behind)
            before = behind
        self.layers = [place for (stream, _), place in self.by_place.items() if stream == "hidden_states"]

    def _new(self, stream: str, layer: int, dtype: torch.dtype | None = None) -> Tap:
        new = self.by_place[stream, layer] = Tap(stream, layer, self.rows, self._device, dtype)
        return new

    def _tap_entry(self, layer: torch.nn.Module, index: int, model: vllm_model.Model) -> Tap | None:
        """Tap what goes into the first layer here: the embeddings, or what the stage before it has sent."""
        if index == 0 and model.is_first_stage:
            place = self._new("embeddings", 0)
        else:
            place = Tap("embeddings", index, self.rows, self._device)
        _tap_entry(layer, model.width, place)
        return place

    def _tap_blocks(self, layer: torch.nn.Module, index: int, width: int) -> list[Addend]:
        found = find_blocks(layer)
        return [self._tap_block(block, index, width) for block in (*found.blocks, *found.norms)]

    def _tap_block(self, block: Block, index: int, width: int) -> Addend:
        place = Tap(block.stream, index, self.rows, self._device)
        control = place.control
        tap_block(block, width, lambda rows, bias: tap(rows, bias, control))
        return Addend(block, place)

    @property
    def watched(self) -> list[Tap]:
        """The taps of which rows are looked at, but for those of experts."""
        blocks = [place for blocks in self.blocks.values() for place in blocks.taps]
        return [*self.layers, *(place for _, place in self.norms), *blocks]

    @property
    def open_places(self) -> list[Tap]:
        """The taps whose rows tell what blocks add, where that is not known yet."""
        return [place for blocks in self.blocks.values() if not blocks.is_settled for place in blocks.taps]

    def take_blocks(self) -> None:
        """Offer the taps of blocks that rows have told."""
        for index, blocks in self.blocks.items():
            self.by_place |= {(stream, index): one.tap for stream, one in blocks.chosen.items()}

    def _tap_experts(self, layer: torch.nn.Module, index: int) -> None:
        experts = find_experts(layer)
        if experts is None:
            return
        logits = self._new("router_logits", index)
        self.experts[index] = experts
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


def tap_norms(stacks: list[StackTaps], rows: Rows[Any], device: torch.device) -> None:
    """Tap what may be the norm behind lists of layers, each once: it may lie beside several of them."""
    tapped: dict[torch.nn.Module, tuple[Norm, Tap]] = {}
    for taps in stacks:
        for norm in taps.stack.norms:
            if norm not in tapped:
                place = Tap("final_hidden_states", taps.stack.num_layers - 1, rows, device)
                # The norm itself, not its tapped forward: a check must not go through the tap again.
                tapped[norm] = norm.forward, place
                _tap_norm(norm, place)
            taps.norms.append(tapped[norm])


def _tap_stream(layer: torch.nn.Module, place: Tap) -> None:
    control = place.control

    def then(result: Any) -> None:
        items = result if isinstance(result, (tuple, list)) else [result]
        rows = [item for item in items if vllm_model.is_rows(item)]
        if rows:
            alike = [item for item in rows if item.shape == rows[0].shape]
            tap(rows[0], alike[1] if len(alike) > 1 else None, control)

    vllm_model.tap_outputs(layer, then)


def _tap_norm(norm: torch.nn.Module, place: Tap) -> None:
    control = place.control

    def then(result: Any) -> None:
        rows = result[0] if isinstance(result, tuple) and result else result
        if vllm_model.is_rows(rows):
            tap(rows, None, control)

    vllm_model.tap_outputs(norm, then)


def _tap_entry(layer: torch.nn.Module, width: int, place: Tap) -> None:
    control = place.control
    vllm_model.tap_entry(layer, width, lambda hidden, residual: tap(hidden, residual, control))


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
    """Return the layers, ascending, of each (stream, dtype, width): they may differ, as in their number of experts."""
    layers: dict[tuple[str, str, int], list[int]] = {}
    # What the blocks of a layer add may be known later than it is of the layers behind it.
    for (stream, layer), place in sorted(taps.items(), key=lambda item: item[0][1]):
        layers.setdefault((stream, dtype_name(place), place.width), []).append(layer)
    return layers


def smallest_integer(num_values: int) -> torch.dtype:
    """Return the smallest integer dtype that holds 0 to num_values - 1."""
    return torch.uint8 if num_values <= 1 << 8 else torch.int16 if num_values <= 1 << 15 else torch.int32
