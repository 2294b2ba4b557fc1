"""Modules that run decide which layers and which norm a model has: models of a few small modules, without vLLM.

Nothing in them is called as vLLM's own files call it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from vllm_tap.engine.model.install import ModelTaps
from vllm_tap.engine.model.residual import SUM, WHOLE
from vllm_tap.engine.model.tap import Rows
from vllm_tap.vllm.decoder import find_stacks
from vllm_tap.vllm.model import Model

WIDTH, NUM_LAYERS = 16, 4
CPU = torch.device("cpu")


class Attention(torch.nn.Module):
    """Mixes something in, and counts as a layer that keeps something of the tokens before."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(WIDTH, WIDTH)

    def get_kv_cache_spec(self, config: object) -> None:
        """Tell vLLM what is kept."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.mix(rows)


class Layer(torch.nn.Module):
    """Takes and returns the whole stream, under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    def forward(self, h: torch.Tensor, where: torch.Tensor) -> Any:
        return h + self.attn(h)


class PairLayer(Layer):
    """Takes and returns a part and what it is to be added to."""

    def forward(self, h: torch.Tensor, residual: torch.Tensor | None) -> Any:
        whole = h if residual is None else h + residual
        return self.attn(whole), whole


class Scale(torch.nn.Module):
    """A norm by another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows / rows.square().mean(-1, keepdim=True).sqrt() * self.weight


class Decoder(torch.nn.Module):
    """Layers, a norm before them, one behind them, and lists that are as long."""

    def __init__(self, kind: type[Layer] = Layer) -> None:
        super().__init__()
        self.spare = torch.nn.ModuleList(kind() for _ in range(NUM_LAYERS))
        self.adapters = torch.nn.ModuleList(torch.nn.Identity() for _ in range(NUM_LAYERS))
        self.ln_in = Scale()
        self.blocks = torch.nn.ModuleList(kind() for _ in range(NUM_LAYERS))
        self.norm = Scale()  # never runs
        self.ln_out = Scale()
        self.leave = NUM_LAYERS

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self.ln_in(rows)
        positions = torch.arange(len(rows))
        for layer, adapter in list(zip(self.blocks, self.adapters, strict=True))[: self.leave]:
            rows = adapter(layer(rows, where=positions))
        return self.ln_out(rows)


class PairDecoder(Decoder):
    """The same, of layers that pass pairs."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        rows, residual = self.ln_in(rows), None
        for layer in self.blocks[: self.leave]:
            rows, residual = layer(rows, residual)
        return self.ln_out(rows + residual)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tapped(model: torch.nn.Module) -> ModelTaps:
    """Return the taps of a model."""
    return ModelTaps(Model(find_stacks(model, NUM_LAYERS), WIDTH, True, True), CPU, Rows())


@torch.no_grad()
def run(taps: ModelTaps, model: Callable[[torch.Tensor], Any], num_rows: int = 8) -> torch.Tensor:
    """Send rows through a model."""
    rows = torch.randn(num_rows, WIDTH)
    model(rows)
    taps.end_pass()
    return rows


def ran(taps: ModelTaps, stream: str = "hidden_states") -> list[int]:
    """Return the layers that a stream is known of."""
    return [layer for (name, layer), place in taps.by_place.items() if name == stream and place.width]


@pytest.mark.parametrize(("kind", "convention"), [(Decoder, WHOLE), (PairDecoder, SUM)])
def test_layers_and_norm_are_those_that_run(kind: Any, convention: str) -> None:
    """Not a list that never does, a norm that never does, one before the layers, or adapters."""
    model = kind(Layer if kind is Decoder else PairLayer)
    taps = tapped(model)
    run(taps, model)
    assert taps.residual().convention == convention
    assert list(taps.layers.values()) == list(model.blocks)
    assert taps.final_norm is not None
    assert taps.final_norm.__self__ is model.ln_out  # type: ignore[attr-defined]
    assert ran(taps) == [0, 1, 2, 3]
    assert ran(taps, "embeddings") == [0]
    assert ran(taps, "final_hidden_states") == [3]
    assert not taps.reasons()
    assert not taps.may_change


@pytest.mark.parametrize("leave", [1, 2, 3])
def test_layers_behind_an_exit_are_not_there(leave: int) -> None:
    """The last one that ran is told by the norm; rows of the others are not offered."""
    model = PairDecoder(PairLayer)
    model.leave = leave
    taps = tapped(model)
    run(taps, model)
    assert taps.residual().convention == SUM
    assert ran(taps) == list(range(leave))
    assert not taps.reasons()
    assert taps.may_change, "they may run one day"
    model.leave = NUM_LAYERS
    run(taps, model)
    assert ran(taps) == [0, 1, 2, 3]


@pytest.mark.parametrize("exits", [(4, 2), (2, 4), (3, 1, 4)])
def test_a_model_that_leaves_elsewhere_each_time_is_told_in_the_end(exits: tuple[int, ...]) -> None:
    """Rows of a layer are never compared with what the norm returned in another forward pass."""
    model = PairDecoder(PairLayer)
    taps = tapped(model)
    for model.leave in exits:
        run(taps, model)
    verdict = taps.residual()
    if not verdict.convention:
        assert "left at another layer" in verdict.reason
        assert verdict.wants_rows
        run(taps, model)
        verdict = taps.residual()
    assert verdict.convention == SUM


def test_an_idle_engine_keeps_rows_of_its_last_layer_alone() -> None:
    """And none of any when it is known what the layers return."""
    model = Decoder()
    taps = tapped(model)
    for _ in range(2):
        run(taps, model)
        kept = [place.layer for stack in taps._stacks for place in stack.layers if place.probe]
        assert kept == [3]
    taps.residual()
    assert not any(place.probe or place.keep_probe for place in taps.by_place.values())


def test_what_is_refused_is_looked_at_again() -> None:
    """Weights may come later: dummy ones are zero, and say nothing."""
    model = PairDecoder(PairLayer)
    kept = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    taps = tapped(model)
    run(taps, model)
    refused = taps.residual()
    assert refused.wants_rows
    assert refused.reason == "all rows that were seen to go through its final norm are zero or not finite"
    model.load_state_dict(kept)
    assert taps.residual() == refused
    run(taps, model)
    assert taps.residual().convention == SUM
    assert not taps.reasons()


class TwoArguments(Layer):
    """A layer that is given two tensors of the stream's width."""

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> Any:
        return h + self.attn(h) + x


def test_an_entry_that_cannot_be_told_is_refused_by_that() -> None:
    """Both could be the stream; the layers themselves are there."""
    model = Decoder(TwoArguments)
    taps = tapped(model)

    def forward(rows: torch.Tensor) -> None:
        start = rows
        for layer in model.blocks:
            rows = layer(rows, start)
        model.ln_out(rows)

    run(taps, forward)
    assert taps.residual().convention == WHOLE
    assert ran(taps, "embeddings") == []
    assert taps.reasons() == {
        "embeddings": "layer 0 was given no tensor of the stream's width (16), or more than one, and none by the name "
        "of hidden_states",
        "attention_output": "layer 0: the rows that go into it were not seen",
    }


class Mapping(Layer):
    """A layer that returns what is no tensor."""

    def forward(self, h: Any, where: torch.Tensor) -> Any:
        return {"rows": h["rows"] if isinstance(h, dict) else h}


def test_layers_that_return_no_tensor_are_said_to_be_silent_and_run_on() -> None:
    """The reason says what was looked at, and that nothing came."""
    model = Decoder(Mapping)
    taps = tapped(model)
    run(taps, lambda rows: model.blocks[0](rows, where=rows[:, 0]))
    verdict = taps.residual()
    assert not verdict.convention
    assert "no rows were seen to go through its decoder layers (" in verdict.reason
    assert ", 4 of Mapping)" in verdict.reason


def test_a_layer_that_returns_a_list_with_other_things_first() -> None:
    """The first tensor of rows is the stream, and one of its shape what may be added."""

    class Listed(PairLayer):
        def forward(self, h: torch.Tensor, residual: torch.Tensor | None) -> Any:
            hidden, whole = super().forward(h, residual)
            return [torch.tensor(1.0), hidden, torch.zeros(len(h), 3), whole]

    model = PairDecoder(Listed)
    taps = tapped(model)

    def forward(rows: torch.Tensor) -> None:
        residual = None
        for layer in model.blocks:
            _, rows, _, residual = layer(rows, residual)
        model.ln_out(rows + residual)

    run(taps, forward)
    assert taps.residual().convention == SUM
