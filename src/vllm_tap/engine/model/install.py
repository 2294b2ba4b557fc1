"""All taps of a model, and what is known of the tensors that pass them. Worker process.

A model may have more than one list that could be the decoder layers, and more than one norm that could be the final
one: all of them are tapped, and what runs decides, in which order, with what rows.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from vllm_tap.engine.model.blocks import convention_of, look_at, reasons_of
from vllm_tap.engine.model.residual import UNKNOWN, Norm, Verdict, decide
from vllm_tap.engine.model.routers import Routers
from vllm_tap.engine.model.stack import StackTaps, tap_norms
from vllm_tap.engine.model.tap import Rows, Tap
from vllm_tap.frame.routing import Routing
from vllm_tap.streams import BLOCK_STREAMS, SOURCES
from vllm_tap.vllm import facts
from vllm_tap.vllm import model as vllm_model

ELSEWHERE: Final = Verdict("", "its last forward pass left at another layer than those before it", True)

HIDDEN: Final = "hidden_states"
FINAL: Final = "final_hidden_states"


class ModelTaps:
    """The taps of a model's decoder layers, by stream and layer in `by_place`; all of them share `rows`.

    Attributes:
        routers: What is said of the routers of the layers.
    """

    def __init__(self, model: vllm_model.Model, device: torch.device, rows: Rows[Any]) -> None:
        self.model, self.rows = model, rows
        self.by_place: dict[tuple[str, int], Tap] = {}
        self._stacks = [StackTaps(stack, model, device, rows) for stack in model.stacks]
        if model.is_last_stage:
            tap_norms(self._stacks, rows, device)
        self._verdict: Verdict | None = None
        self._is_settled = self._is_wide = False
        self._keep_probes(self._stacks)
        for place in (place for stack in self._stacks for place in stack.open_places):
            place.keep_probe = True
        self._choose(self._stacks[0])

    def _choose(self, stack: StackTaps) -> None:
        """Take a list for the decoder layers, and the first norm that may be the one behind it."""
        self._stack, self.routers = stack, Routers(stack.experts, stack.by_place)
        self.by_place.clear()
        self.by_place |= stack.by_place
        self._take_norm(0)

    def _take_norm(self, index: int) -> None:
        for _, place in self._stack.norms[index : index + 1]:
            self.by_place[FINAL, place.layer] = place

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model, over all pipeline stages."""
        return self._stack.stack.num_layers

    @property
    def layers(self) -> dict[int, torch.nn.Module]:
        """The decoder layers that this worker holds."""
        return self._stack.stack.layers

    @property
    def final_norm(self) -> Norm | None:
        """The norm behind the last layer, without its tap."""
        place = self.by_place.get((FINAL, self.num_layers - 1))
        return next((norm for norm, tap in self._stack.norms if tap is place), None)

    @property
    def seen(self) -> bool:
        """True if a forward pass has gone through layers, so that widths and dtypes are known."""
        return any(place.width for stack in self._stacks for place in stack.layers) or not self._stack.layers

    @property
    def wants_rows(self) -> bool:
        """True if a forward pass of rows with values in them would let more be said of blocks."""
        return any(blocks.wants_rows for blocks in self._stack.blocks.values())

    @property
    def may_change(self) -> bool:
        """True if forward passes that are still to come may change what is said here."""
        return (not self._is_settled and self.model.is_last_stage) or not all(tap.width for tap in self._stack.layers)

    # ------------------------------------------------------------------------------------------- which layers there are

    def end_pass(self) -> None:
        """Count a forward pass that has ended, or is about to begin. Two of its layers' probes are enough for the next.

        The first one shows which layers run at all, and what their blocks add; after it, an idle engine keeps rows of
        the last of them alone.
        """
        self.rows.num_passes += 1
        if not self._is_wide or not self.seen:
            return
        self._is_wide = False
        self._look_at_blocks()
        self._let_go()

    def _keep_probes(self, stacks: list[StackTaps]) -> None:
        """Watch the next forward pass."""
        self._is_wide = True
        for stack in stacks if self.model.is_last_stage else ():
            for place in (*stack.layers, *(place for _, place in stack.norms)):
                place.keep_probe = True

    def _let_go(self) -> None:
        """Keep no rows that nothing is to be told by, and watch nothing for them."""
        needed = {place for stack in self._stacks for place in stack.open_places}
        for stack in self._stacks if self.model.is_last_stage and not self._is_settled else ():
            last = None if self._is_wide else _last(stack.layers)
            needed |= {place for place in stack.layers if last is None or place.layer >= last.layer}
            needed |= {place for _, place in stack.norms}
        for place in {place for stack in self._stacks for place in stack.watched} - needed:
            place.keep_probe, place.probe = False, None

    def _look_at_blocks(self) -> None:
        """Decide by the last forward pass what the blocks of layers add."""
        for stack in (stack for stack in self._stacks if stack.open_places):
            look_at(stack.blocks)
            stack.take_blocks()
            self._let_go()
        self.by_place |= self._stack.by_place

    # --------------------------------------------------------------------------------------------- what they return

    def residual(self) -> Verdict:
        """Decide what the layers return; stages without the final norm leave it to the one that has it.

        Once it is known it stays so. Where it is refused, or the rows seen so far had no values in them, the forward
        passes that follow are watched: weights may come later.
        """
        self._look_at_blocks()
        if not self.model.is_last_stage:
            ran = [stack for stack in self._stacks if any(place.width for place in stack.layers)]
            if ran and self._stack not in ran:
                self._choose(ran[0])
            return UNKNOWN
        if not self._is_settled:
            self._look()
        return self._verdict or _silent(self._stack)

    def _look(self) -> None:
        """Decide by the probes of the last forward pass, if it went through layers."""
        stack = _last_stack(self._stacks)
        if stack is None:
            return
        norms = [(norm, place, place.probe) for norm, place in stack.norms if place.probe is not None]
        number = max((probe.number for _, _, probe in norms), default=-1)
        last = _last(stack.layers, number)
        if last is None or last.probe is None:
            # It left at an earlier layer than the one before it: see at which.
            self._keep_probes(self._stacks)
            self._verdict = self._verdict or ELSEWHERE
            return
        behind = [found for found in norms if found[2].number == last.probe.number]
        behind.sort(key=lambda found: found[2].order, reverse=True)
        verdict = decide(last.probe, [(norm, probe) for norm, _, probe in behind])
        if stack is not self._stack:
            self._choose(stack)
        for _, place, _ in behind[max(verdict.norm, 0) :][:1]:
            self.by_place[FINAL, place.layer] = place
        self._verdict, self._is_settled = verdict, bool(verdict.convention)
        self._let_go()

    def conventions(self) -> dict[str, str]:
        """Return which tensor the rows of each stream are."""
        blocks = {stream: convention_of(self._stack.blocks, stream) for stream in BLOCK_STREAMS}
        return SOURCES | blocks | {HIDDEN: self.residual().convention}

    def reasons(self) -> dict[str, str]:
        """Return why streams whose places exist cannot be had: {stream: reason}."""
        verdict = self.residual()
        reasons = {HIDDEN: verdict.reason} if verdict.reason else {}
        ran = any(place.width for place in self._stack.layers)
        final = self.by_place.get((FINAL, self.num_layers - 1))
        if self.model.is_last_stage and (final is None or (ran and not final.width)):
            reasons[FINAL] = "it has no norm behind its last layer, whose hidden_states are final"
        entry = self.by_place.get(("embeddings", 0))
        if entry is not None and not entry.width and self._stack.layers[0].width:
            reasons["embeddings"] = (
                f"layer 0 was given no tensor of the stream's width ({self.model.width}), or more than one, and none "
                "by the name of hidden_states"
            )
        return reasons | self._reasons_of_blocks() | self._reasons_of_experts()

    def _reasons_of_blocks(self) -> dict[str, str]:
        if self.model.fuses_reduction:
            return dict.fromkeys(BLOCK_STREAMS, self.model.fuses_reduction)
        return reasons_of(self._stack.blocks)

    def _reasons_of_experts(self) -> dict[str, str]:
        reasons = {}
        for layer, experts in self._stack.experts.items():
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
        return self.routers.read()


def _last(layers: list[Tap], number: int = -1) -> Tap | None:
    """Return the last layer that ran, in a forward pass of this number or in the last one that is known."""
    probes = [place.probe.number for place in layers if place.probe is not None]
    number = max(probes, default=-1) if number < 0 else number
    ran = [place for place in layers if place.probe is not None and place.probe.number == number]
    return max(ran, key=lambda place: place.layer, default=None)


def _last_stack(stacks: list[StackTaps]) -> StackTaps | None:
    """Return the list whose layers ran last; None if none did."""

    def order(stack: StackTaps) -> int:
        return max((place.probe.order for place in stack.layers if place.probe is not None), default=-1)

    best = max(stacks, key=order)
    return best if order(best) >= 0 else None


def _silent(stack: StackTaps) -> Verdict:
    return Verdict("", f"no rows were seen to go through its decoder layers ({stack.stack})", True)
