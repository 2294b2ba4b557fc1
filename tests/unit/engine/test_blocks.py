"""What blocks add to the residual stream, on small layers of each form: the rows that arrive, or why none do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from vllm_tap.engine.model.install import ModelTaps
from vllm_tap.engine.model.stack import by_shape
from vllm_tap.engine.model.tap import Rows, Tap
from vllm_tap.vllm import model as vllm_model
from vllm_tap.vllm.decoder import Stack

WIDTH, NUM_ROWS = 16, 8
CPU = torch.device("cpu")
STREAMS = ("attention_output", "mlp_output")


class Attention(torch.nn.Module):
    """A block that keeps something of the tokens before; its rows are returned, beside a bias or None, or written."""

    def __init__(self, way: str = "rows") -> None:
        super().__init__()
        self.o_proj, self.way = torch.nn.Linear(WIDTH, WIDTH), way

    def get_kv_cache_spec(self) -> None:
        """Return nothing: it is looked for by name."""

    def forward(self, rows: torch.Tensor, output: torch.Tensor | None = None) -> object:
        found = self.o_proj(rows)
        if self.way == "argument":
            assert output is not None
            output.copy_(found)
            return None
        return (found, None) if self.way == "tuple" else (found, self.o_proj.bias) if self.way == "bias" else found


class Mlp(torch.nn.Module):
    """A block of another kind."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(3 * WIDTH, WIDTH)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(rows).relu())


class Layer(torch.nn.Module):
    """A decoder layer; `added` are the rows that its blocks have added, by stream."""

    def __init__(self, way: str = "rows") -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(way), Mlp()
        self.input_layernorm, self.post_attention_layernorm = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.added: dict[str, torch.Tensor] = {}

    def attend(self, rows: torch.Tensor) -> torch.Tensor:
        """Return what the attention makes of the rows."""
        output = torch.empty_like(rows)
        found = self.self_attn(rows, output=output)
        rows, bias = found if isinstance(found, tuple) else (output if found is None else found, None)
        return rows if bias is None else rows + bias

    def add(self, stream: str, rows: torch.Tensor) -> torch.Tensor:
        """Note what is added."""
        self.added[stream] = rows.clone()
        return rows

    def forward(self, hidden_states: torch.Tensor) -> object:
        rows = hidden_states + self.add("attention_output", self.attend(self.input_layernorm(hidden_states)))
        return rows + self.add("mlp_output", self.mlp(self.post_attention_layernorm(rows)))


class Parallel(Layer):
    """Attention and MLP read the same rows; one is added to the other in its memory."""

    def forward(self, hidden_states: torch.Tensor) -> object:
        normed = self.input_layernorm(hidden_states)
        attended = self.add("attention_output", self.attend(normed))
        rows = self.mlp(normed)
        self.add("mlp_output", rows)
        rows += attended
        return rows + hidden_states


class Pair(Layer):
    """A layer that returns what is still to be added."""

    def forward(self, hidden_states: torch.Tensor, residual: torch.Tensor | None = None) -> object:
        residual = hidden_states if residual is None else hidden_states + residual
        residual = residual + self.add("attention_output", self.attend(self.input_layernorm(residual)))
        return self.add("mlp_output", self.mlp(self.post_attention_layernorm(residual))), residual


class Sandwich(Layer):
    """A layer with norms before and behind its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_feedforward_layernorm = torch.nn.LayerNorm(WIDTH)
        self.post_feedforward_layernorm = torch.nn.LayerNorm(WIDTH)

    def forward(self, hidden_states: torch.Tensor) -> object:
        attended = self.post_attention_layernorm(self.attend(self.input_layernorm(hidden_states)))
        rows = hidden_states + self.add("attention_output", attended)
        fed = self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(rows)))
        return rows + self.add("mlp_output", fed)


class Scaled(Layer):
    """A layer that multiplies what it adds."""

    residual_multiplier = 0.22

    def forward(self, hidden_states: torch.Tensor) -> object:
        attended = self.attend(self.input_layernorm(hidden_states)) * self.residual_multiplier
        rows = hidden_states + self.add("attention_output", attended)
        return rows + self.add("mlp_output", self.mlp(rows) * self.residual_multiplier)


class Loose(Layer):
    """A layer whose MLP is no module of its own."""

    def __init__(self) -> None:
        super().__init__()
        del self.mlp
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: torch.Tensor) -> object:
        rows = hidden_states + self.add("attention_output", self.attend(hidden_states))
        return rows + self.add("mlp_output", self.fc2(self.fc1(rows).relu()))


class AttentionAlone(Layer):
    """A layer without an MLP."""

    def __init__(self) -> None:
        super().__init__()
        del self.mlp

    def forward(self, hidden_states: torch.Tensor) -> object:
        return hidden_states + self.add("attention_output", self.attend(hidden_states))


class Twice(Layer):
    """A layer with two blocks of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder_attn = Attention()

    def forward(self, hidden_states: torch.Tensor) -> object:
        rows = hidden_states + self.attend(hidden_states)
        rows = rows + self.encoder_attn(rows)
        return rows + self.add("mlp_output", self.mlp(rows))


class PostNorm(Layer):
    """A layer that norms the stream itself."""

    def forward(self, hidden_states: torch.Tensor) -> object:
        rows = self.input_layernorm(hidden_states + self.attend(hidden_states))
        return self.post_attention_layernorm(rows + self.mlp(rows))


def run(*layers: torch.nn.Module, values: float = 1.0, passes: int = 1) -> ModelTaps:
    """Return the taps of a model of these layers, after forward passes over a few rows."""
    stack = Stack("layers", dict(enumerate(layers)), len(layers), ())
    taps = ModelTaps(vllm_model.Model((stack,), WIDTH, True, True), CPU, Rows())
    for number in range(passes):
        rows: tuple[torch.Tensor, ...] = (
            values * torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(number)),
        )
        for layer in layers:
            with torch.inference_mode():
                found = layer(*rows)
            rows = found if isinstance(found, tuple) else (found,)
    return taps


def passed(taps: ModelTaps, stream: str, layer: int, again: Callable[[], None]) -> torch.Tensor:
    """Return the rows that pass a tap when a layer runs again."""
    place: Tap = taps.by_place[stream, layer]
    place.keep_probe = True
    again()
    assert place.probe is not None
    return place.probe.hidden if place.probe.residual is None else place.probe.hidden + place.probe.residual


@pytest.mark.parametrize(
    "kind",
    [
        Layer,
        lambda: Layer("tuple"),
        lambda: Layer("argument"),
        lambda: Layer("bias"),
        Parallel,
        Sandwich,
        Scaled,
        Loose,
        AttentionAlone,
        Pair,
    ],
    ids=["rows", "tuple", "argument", "bias", "parallel", "sandwich", "scaled", "loose", "alone", "pair"],
)
def test_rows_are_those_that_a_layer_adds(kind: Callable[[], Layer]) -> None:
    """The taps that the sum has told see bit by bit what each layer adds."""
    torch.manual_seed(0)
    layers = [kind() for _ in range(3)]
    taps = run(*layers)
    assert not {stream for stream in STREAMS if stream in taps.reasons()}
    with torch.inference_mode():
        for index, layer in enumerate(layers):
            for stream in layer.added:
                rows = passed(taps, stream, index, lambda layer=layer: layer(torch.randn(NUM_ROWS, WIDTH)))
                assert torch.equal(rows, layer.added[stream]), (stream, index)
            assert {stream for stream, number in taps.by_place if number == index} & set(STREAMS) == set(layer.added)


def test_conventions_name_the_modules() -> None:
    """A user reads which modules' output the rows are."""
    torch.manual_seed(0)
    taps = run(Sandwich(), Scaled())
    taps.reasons()
    assert taps.conventions()["attention_output"] == "output of post_attention_layernorm or self_attn * 0.22"


def test_what_does_not_add_up_is_refused_with_the_numbers() -> None:
    """A layer that norms the stream has no such rows; the reason says how far off the sum is."""
    torch.manual_seed(0)
    reasons = run(PostNorm(), PostNorm()).reasons()
    for stream in STREAMS:
        assert "layer 0: the stream before it, self_attn and mlp do not add up" in reasons[stream]
        assert "times rounding" in reasons[stream]
    assert not run(Layer()).reasons().keys() & set(STREAMS)


def test_two_blocks_of_a_kind_are_refused_and_the_other_is_not() -> None:
    """Where a layer adds two blocks of attention, what each of them adds is no single tensor."""
    torch.manual_seed(0)
    taps = run(Twice(), Twice())
    assert taps.reasons()["attention_output"].endswith("several blocks of the kind: self_attn, encoder_attn")
    assert "mlp_output" not in taps.reasons()
    assert ("mlp_output", 1) in taps.by_place


def test_norms_behind_blocks_are_taken_where_the_first_rows_of_attention_are_zeros() -> None:
    """As of GPUs, which leave attention out of the forward pass by which an engine measures memory."""
    torch.manual_seed(0)
    layers = [Sandwich(), Sandwich()]
    weights = [layer.self_attn.o_proj.weight.data.clone() for layer in layers]
    for layer in layers:
        for parameter in (*layer.self_attn.parameters(), layer.post_attention_layernorm.bias):
            parameter.data.zero_()
    taps = run(*layers)
    taps.end_pass()
    for layer, weight in zip(layers, weights, strict=True):
        layer.self_attn.o_proj.weight.data.copy_(weight)
    with torch.inference_mode():
        rows = passed(taps, "attention_output", 1, lambda: layers[1](torch.randn(NUM_ROWS, WIDTH)))
    assert torch.equal(rows, layers[1].added["attention_output"])
    assert taps.conventions()["attention_output"] == "output of post_attention_layernorm"


def test_rows_of_padding_tell_nothing() -> None:
    """Rows that are zero are waited out, and the taps keep no rows once others have told."""
    torch.manual_seed(0)
    layers = [Layer(), Layer()]
    for layer in layers:
        for weight in layer.parameters():
            weight.data.zero_()
    taps = run(*layers, values=0.0)
    taps.end_pass()
    assert taps.wants_rows
    for layer in layers:
        for weight in layer.parameters():
            torch.nn.init.normal_(weight)
    rows = torch.randn(NUM_ROWS, WIDTH)
    with torch.inference_mode():
        for layer in layers:
            rows = layer(rows)
    taps.reasons()
    assert not taps.wants_rows
    assert ("mlp_output", 1) in taps.by_place
    assert all(place.probe is None for place in taps.by_place.values() if place.stream in STREAMS)


def test_layers_are_in_order_whichever_is_known_first() -> None:
    """Where the first layer here was given padding and the one behind it told, rows are still shipped in order."""
    torch.manual_seed(0)
    layers = [Layer(), Layer()]
    weights = [weight.data.clone() for weight in layers[0].parameters()]
    for weight in layers[0].parameters():
        weight.data.zero_()
    taps = run(*layers, values=0.0)
    taps.end_pass()
    assert ("mlp_output", 1) in taps.by_place
    assert ("mlp_output", 0) not in taps.by_place
    for weight, value in zip(layers[0].parameters(), weights, strict=True):
        weight.data.copy_(value)
    rows = torch.randn(NUM_ROWS, WIDTH)
    with torch.inference_mode():
        for layer in layers:
            rows = layer(rows)
    taps.reasons()
    held = {place: tap for place, tap in taps.by_place.items() if tap.width}
    assert [found for (stream, *_), found in by_shape(held).items() if stream in STREAMS] == [[0, 1], [0, 1]]


def test_an_idle_engine_keeps_no_rows_of_blocks() -> None:
    """After the first forward pass nobody need ask: what the blocks add is known, and their rows are let go."""
    torch.manual_seed(0)
    taps = run(Layer(), Layer())
    taps.end_pass()
    assert {("attention_output", 0), ("mlp_output", 1)} <= set(taps.by_place)
    assert all(not place.keep_probe for place in taps.by_place.values() if place.stream in STREAMS)
    assert not any(place.probe for place in taps.by_place.values() if place.stream in STREAMS)


def test_a_fused_reduction_is_left_alone() -> None:
    """Where the compiler joins the sum over ranks with a norm, nothing is tapped in between."""
    layers = [Layer()]
    stack = Stack("layers", dict(enumerate(layers)), 1, ())
    taps = ModelTaps(vllm_model.Model((stack,), WIDTH, True, True, "it is fused"), CPU, Rows())
    assert "forward" not in vars(layers[0].mlp)
    assert taps.reasons()["mlp_output"] == "it is fused"
