"""Statements about routers stay true when their bias changes, without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import pytest
import torch

from routing import follow
from vllm_tap.engine.model.residual import NO_ROWS
from vllm_tap.engine.model.routers import CHANGED, MIXED, Routers
from vllm_tap.engine.model.tap import Probe, Rows, Tap
from vllm_tap.frame.routing import UNKNOWN, Routing
from vllm_tap.streams import ROUTER_STREAMS
from vllm_tap.vllm.experts import Experts, read_routing

NUM_EXPERTS = 8
CPU = torch.device("cpu")


class FusedTopKBiasRouter(SimpleNamespace):
    """A router under a name that vLLM has."""


def experts(bias: torch.Tensor | None) -> Experts:
    """Return experts whose router chooses two by this bias."""
    router = FusedTopKBiasRouter(
        scoring_func="sigmoid", top_k=2, renormalize=True, routed_scaling_factor=1.0, select_experts=print,
        e_score_correction_bias=bias, num_fused_shared_experts=0,
    )  # fmt: skip
    return Experts(SimpleNamespace(), router, NUM_EXPERTS, NUM_EXPERTS, False, "")


class Layers:
    """Routers of some layers, of which every second has a bias, and rows that they choose for."""

    def __init__(self, number: int = 4) -> None:
        self.biases = {layer: torch.randn(NUM_EXPERTS) if layer % 2 else None for layer in range(number)}
        self.experts = {layer: experts(bias) for layer, bias in self.biases.items()}
        names = [(stream, layer) for layer in range(number) for stream in ROUTER_STREAMS]
        self.taps = {place: Tap(*place, Rows(), CPU) for place in names}
        self.routers = Routers(self.experts, self.taps)

    def rows(self, layer: int) -> list[torch.Tensor]:
        """Return logits, and what the router of a layer chooses by them now."""
        logits = torch.randn(32, NUM_EXPERTS)
        return [logits, *follow(read_routing(self.experts[layer]), logits)]

    def pass_rows(self) -> None:
        """Have the taps keep what a forward pass brings."""
        for layer in self.experts:
            for stream, rows in zip(ROUTER_STREAMS, self.rows(layer), strict=True):
                self.taps[stream, layer].probe = Probe(rows, None)

    def capture(self, rows: bool = True) -> tuple[int, dict[int, Routing]]:
        """Return what is said after a capture."""
        return self.routers.check(self.routers.biases(), self.rows if rows else lambda layer: [])


@pytest.fixture
def layers() -> Layers:
    """Routers, confirmed by a first forward pass."""
    torch.manual_seed(0)
    layers = Layers()
    layers.pass_rows()
    assert all(routing.checked for routing in layers.routers.read().values())
    return layers


def biases(routing: dict[int, Routing]) -> dict[int, tuple[float, ...]]:
    """Return what is said to be added."""
    return {layer: found.bias for layer, found in routing.items() if found.bias}


def test_nothing_is_said_anew_where_nothing_has_changed(layers: Layers) -> None:
    """The version stays, so the client is sent nothing."""
    version = layers.routers.version
    assert layers.capture() == (version, layers.routers.read())
    assert layers.capture(rows=False)[0] == version


def test_a_bias_that_has_changed_is_read_again_and_confirmed_by_the_captures_rows(layers: Layers) -> None:
    """In place, as a reload does it; or by another tensor."""
    version = layers.routers.version
    layers.biases[1].add_(1.0 + torch.rand(NUM_EXPERTS))
    layers.experts[3].router.e_score_correction_bias = torch.randn(NUM_EXPERTS)
    later, routing = layers.capture()
    assert later > version
    assert all(found.checked for found in routing.values())
    current = {layer: layers.experts[layer].router.e_score_correction_bias for layer in (1, 3)}
    assert biases(routing) == {layer: tuple(bias.tolist()) for layer, bias in current.items()}


def test_without_rows_it_is_said_and_not_called_confirmed(layers: Layers) -> None:
    """A capture of other streams; the next one that has the rows confirms it."""
    layers.biases[1].add_(torch.rand(NUM_EXPERTS))
    version, routing = layers.capture(rows=False)
    assert {layer: found.checked for layer, found in routing.items()} == {0: True, 1: False, 2: True, 3: True}
    assert biases(routing)[1] == tuple(layers.biases[1].tolist())
    later, routing = layers.capture()
    assert later > version
    assert routing[1].checked


def test_a_bias_that_changes_while_a_capture_is_under_way(layers: Layers) -> None:
    """Of its rows nothing can be said by one bias; of those of the next capture it can."""
    begun = layers.routers.biases()
    layers.biases[3].mul_(-1)
    version, routing = layers.routers.check(begun, lambda layer: [])
    assert version == MIXED
    assert (routing[3].scoring, routing[3].reason) == (UNKNOWN, CHANGED)
    assert routing[1].checked
    version, routing = layers.capture()
    assert version != MIXED
    assert routing[3].checked
    assert biases(routing)[3] == tuple(layers.biases[3].tolist())


def test_rows_refute_too(layers: Layers) -> None:
    """A router that does something else with the new bias than it states."""
    layers.biases[1].add_(torch.rand(NUM_EXPERTS))
    stated = msgspec.structs.replace(read_routing(layers.experts[1]), bias=())
    logits = torch.randn(32, NUM_EXPERTS)
    _, routing = layers.routers.check(None, lambda layer: [logits, *follow(stated, logits)])
    assert routing[1].scoring == UNKNOWN
    assert "do not follow from the logits" in routing[1].reason


def test_a_capture_confirms_what_dummy_rows_did_not() -> None:
    """As if only padding had been seen."""
    layers = Layers()
    assert {found.reason for found in layers.routers.read().values()} == {NO_ROWS}
    _, routing = layers.capture()
    assert all(found.checked for found in routing.values())


def test_a_model_without_experts_says_nothing() -> None:
    """And does nothing for it."""
    routers = Routers({}, {})
    assert routers.check(routers.biases(), lambda layer: []) == (0, {})
