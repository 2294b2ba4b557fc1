"""Where taps go in a model's experts, on a model of two layers that passes logits on as vLLM's runner does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_tap import Spec
from vllm_tap.client.layers import resolve
from vllm_tap.engine.capture.selection import Run
from vllm_tap.engine.model.install import ModelTaps
from vllm_tap.engine.model.tap import ADD, Group, Plane, Rows, Tap
from vllm_tap.errors import CaptureError, EngineUnsupportedError, LayerError, SpecError
from vllm_tap.vllm import model as vllm_model
from vllm_tap.vllm.decoder import Stack

NUM_EXPERTS = 4
CPU = torch.device("cpu")


class FusedTopKRouter:
    """A router under a name that vLLM has; it chooses the two highest experts."""

    top_k, scoring_func, renormalize = 2, "softmax", False

    def select_experts(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights and ids."""
        return tuple(logits.softmax(-1).topk(2))


class Method:
    """The method of the experts, which may choose by itself."""

    def __init__(self, is_monolithic: bool) -> None:
        self.is_monolithic = is_monolithic


class Experts(torch.nn.Module):
    """What vLLM's runner of experts does, as far as it is tapped."""

    def __init__(self, is_monolithic: bool = False, gathers: bool = False) -> None:
        super().__init__()
        self.do_naive_dispatch_combine = gathers
        self.moe_config = SimpleNamespace(num_experts=NUM_EXPERTS)
        self.router = FusedTopKRouter()
        self.routed_experts = SimpleNamespace(quant_method=Method(is_monolithic))

    def _maybe_dispatch(self, hidden_states: torch.Tensor, router_logits: torch.Tensor) -> Any:
        others = [router_logits] if self.do_naive_dispatch_combine else []
        return hidden_states, torch.cat([*others, router_logits])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        _, logits = self._maybe_dispatch(hidden, hidden[:, :NUM_EXPERTS])
        if not self.routed_experts.quant_method.is_monolithic:
            self.router.select_experts(logits)
        return hidden


class Layer(torch.nn.Module):
    """A decoder layer."""

    def __init__(self, experts: torch.nn.Module | None) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states if self.experts is None else self.experts(hidden_states)


def tapped(*layers: torch.nn.Module) -> ModelTaps:
    """Return the taps of a model of these layers, after a forward pass over a few rows."""
    stack = Stack("layers", dict(enumerate(layers)), len(layers), ())
    taps = ModelTaps(vllm_model.Model((stack,), 16, True, True), CPU, Rows())
    hidden = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        hidden = layer(hidden)
    return taps


def connection_of(taps: ModelTaps) -> Any:
    """Return what a client learns of a worker with these taps."""
    reasons = taps.reasons()
    places = {place: tap for place, tap in taps.by_place.items() if tap.width and place[0] not in reasons}
    return SimpleNamespace(
        num_layers=taps.num_layers,
        available=lambda stream: sorted(layer for name, layer in places if name == stream),
        why_not=lambda stream: reasons.get(stream, ""),
    )


def test_a_router_is_tapped_and_what_it_states_is_confirmed() -> None:
    """Experts and weights arrive in layers that have them, and the rows that went through confirm the router."""
    taps = tapped(Layer(None), Layer(Experts()))
    spec = Spec(router_logits="all", routed_experts="all")
    assert resolve(connection_of(taps), spec) == dict.fromkeys(("router_logits", "expert_ids", "expert_weights"), (1,))
    assert {layer: str(routing) for layer, routing in taps.routing().items()} == {
        1: "softmax, the 2 highest experts, scores of the chosen"
    }
    with pytest.raises(LayerError, match=r"layer 0 has no experts. Layers with expert_ids: \[1\]"):
        resolve(connection_of(taps), Spec(routed_experts=[0]))


def test_replicas_of_experts_have_no_logits_of_their_own() -> None:
    """As with redundant experts (EPLB): logits are one for each expert, and ids may be those of replicas."""
    experts = Experts()
    experts.moe_config = SimpleNamespace(num_experts=300, num_logical_experts=NUM_EXPERTS)
    taps = tapped(Layer(experts))
    assert "router_logits" not in taps.reasons()
    assert taps.by_place["router_logits", 0].width == NUM_EXPERTS
    assert taps.by_place["expert_ids", 0].dtype == torch.int16


def test_only_the_first_rows_are_kept_for_it() -> None:
    """An idle engine keeps no rows of its routers after the first forward pass, and none after the statement."""
    taps = tapped(Layer(Experts()))
    routed = [tap for (stream, _), tap in taps.by_place.items() if stream in ("router_logits", "expert_ids")]
    assert [tap.keep_probe for tap in routed] == [False, False]
    taps.routing()
    assert [tap.probe for tap in routed] == [None, None]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"is_monolithic": True}, r"lets a kernel \(Method\) choose"),
        ({"gathers": True}, "gathers the rows of all data parallel engines"),
    ],
)
def test_a_choice_that_cannot_be_seen_is_refused(settings: dict[str, bool], reason: str) -> None:
    """Ids and weights are refused with the reason and the way out; logits, and what the router states, are there."""
    taps = tapped(Layer(Experts(**settings)))
    connection = connection_of(taps)
    assert connection.available("router_logits") == [0]
    assert not [place for place in taps.by_place if place[0] in ("expert_ids", "expert_weights")]
    expected = rf"expert_ids cannot be captured.*layer 0.*{reason}.*Capture router_logits; Capture.routing says"
    for layers in ("all", [0]):
        with pytest.raises(EngineUnsupportedError, match=expected):
            resolve(connection, Spec(routed_experts=layers))
    routing = taps.routing()[0]
    assert (routing.scoring, routing.num_chosen, routing.checked) == ("softmax", 2, False)
    assert "no rows have confirmed it" in str(routing)


def test_a_model_without_experts() -> None:
    """All of its layers with experts are none, which is refused unless that may be; one that is named is refused."""
    connection = connection_of(tapped(Layer(None), Layer(None)))
    streams = {"router_logits": (), "expert_ids": (), "expert_weights": ()}
    assert resolve(connection, Spec(router_logits="all", routed_experts="all", missing="skip")) == streams
    for field in ("router_logits", "routed_experts"):
        with pytest.raises(SpecError, match=rf'{field}="all" chooses no layer.*Leave {field} out.*missing="skip"'):
            resolve(connection, Spec(**{field: "all"}))
    for spec in (Spec(router_logits=[1]), Spec(routed_experts=[-1])):
        with pytest.raises(LayerError, match="belongs to a model without experts"):
            resolve(connection, spec)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_layer_that_leaves_rows_out_ends_the_capture_alone(num_rows: int) -> None:
    """A single row would be copied to all places, fewer would be an error in the model's forward pass."""
    tap = Tap("hidden_states", 0, Rows(), CPU)
    whole, few, planes = Group(), Group(), torch.zeros(2, 3, 4)
    tap.planes = {whole: Plane(planes[0], ADD), few: Plane(planes[1, :1], ADD)}
    whole.runs, whole.num_tokens = (Run(0, 0, 3),), 3
    few.runs, few.num_tokens = (Run(0, 0, 1),), 1
    torch.ops.vllm_tap.tap(torch.ones(num_rows, 4), None, tap.control)
    assert isinstance(whole.failure, CaptureError)
    assert f"hidden_states[0] passed {num_rows} rows in a step of at least 3" in str(whole.failure)
    assert not whole.runs
    assert not planes[0].any()
    assert (few.failure, planes[1, 0].tolist()) == (None, [1.0] * 4), "another capture goes on"


@pytest.mark.parametrize(
    "changed",
    [torch.ones(3, 5), torch.ones(3, 1), torch.ones(3, 4, dtype=torch.float64)],
    ids=["wider", "one", "dtype"],
)
def test_rows_of_another_kind_than_before_end_the_capture_alone(changed: torch.Tensor) -> None:
    """They would be rounded, or copied to all columns, without a word."""
    tap = Tap("hidden_states", 0, Rows(), CPU)
    torch.ops.vllm_tap.tap(torch.ones(3, 4), None, tap.control)
    group, rows = Group(), torch.zeros(3, 4)
    tap.planes = {group: Plane(rows, ADD)}
    group.runs, group.num_tokens = (Run(0, 0, 3),), 3
    torch.ops.vllm_tap.tap(changed, None, tap.control)
    assert isinstance(group.failure, CaptureError)
    assert "the model has changed since it was loaded" in str(group.failure)
    assert not rows.any()
