"""Lists that can be the decoder layers, on models of a few empty modules. Needs no vLLM."""

from __future__ import annotations

import pytest
import torch

from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.vllm.decoder import find_stacks

NUM_LAYERS = 4


class Attention(torch.nn.Module):
    """A layer of vLLM that keeps something of the tokens before."""

    def get_kv_cache_spec(self, config: object) -> None:
        """Tell vLLM what is kept."""


class Layer(torch.nn.Module):
    """A decoder layer."""

    def __init__(self, has_cache: bool = True) -> None:
        super().__init__()
        self.attn = Attention() if has_cache else torch.nn.Identity()
        self.mlp = torch.nn.Linear(8, 8)


class PPMissingLayer(torch.nn.Identity):
    """The module that vLLM puts in the place of a layer that another pipeline stage has."""


class ByName(torch.nn.Module):
    """A module of these children."""

    def __init__(self, **children: torch.nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


def layers(number: int = NUM_LAYERS, has_cache: bool = True) -> torch.nn.ModuleList:
    """Return a list of layers."""
    return torch.nn.ModuleList(Layer(has_cache) for _ in range(number))


def adapters(number: int = NUM_LAYERS) -> torch.nn.ModuleList:
    """Return a list of modules that keep nothing, with many weights."""
    return torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(number))


def names(model: torch.nn.Module, number: int = NUM_LAYERS) -> list[str]:
    """Return where the decoder layers may be."""
    return [stack.name for stack in find_stacks(model, number)]


def test_a_list_of_adapters_as_long_is_not_taken_for_the_layers() -> None:
    """Before the layers or after them, with more weights, and in a module that says where its stage begins."""
    decoder = ByName(adapters=adapters(), layers=layers(), more=adapters())
    decoder.start_layer, decoder.end_layer = 0, NUM_LAYERS
    assert names(ByName(model=decoder)) == ["model.layers"]


@pytest.mark.parametrize("num_encoder", [2, 3, 4])
@pytest.mark.parametrize("order", ["encoder first", "decoder first"])
def test_a_decoder_beside_an_encoder_of_another_number_of_layers(num_encoder: int, order: str) -> None:
    """The configuration says how many the encoder has, and the decoder has as many as its list."""
    parts = {"encoder": ByName(layers=layers(num_encoder, has_cache=False)), "decoder": ByName(layers=layers(4))}
    model = ByName(**dict(sorted(parts.items(), reverse=order == "encoder first")))
    (stack,) = find_stacks(model, num_encoder)
    assert (stack.name, stack.num_layers, list(stack.layers)) == ("decoder.layers", 4, [0, 1, 2, 3])


@pytest.mark.parametrize(
    "container",
    [torch.nn.Sequential(*layers()), torch.nn.ModuleDict({f"layer{i}": layer for i, layer in enumerate(layers())})],
    ids=lambda container: type(container).__name__,
)
def test_other_containers_are_lists_too(container: torch.nn.Module) -> None:
    """In the order in which they hold their modules."""
    (stack,) = find_stacks(ByName(blocks=container), NUM_LAYERS)
    assert list(stack.layers.values()) == list(container.children())


def test_lists_inside_the_layers_are_parts_of_them() -> None:
    """Also where they cache, and are as long."""
    outer = layers()
    for layer in outer:
        layer.heads = layers()
    assert names(ByName(layers=outer)) == ["layers"]


def test_where_nothing_caches_the_list_of_the_right_length_is_taken() -> None:
    """As in vLLM's Transformers backend; not that of images, nor a short one."""
    model = ByName(
        vision=ByName(layers=layers(has_cache=False)), model=ByName(layers=layers(has_cache=False), few=adapters(2))
    )
    assert names(model) == ["model.layers"]
    assert names(ByName(encoder=ByName(layer=layers(has_cache=False)))) == ["encoder.layer"], "an encoder alone"


def test_equals_are_all_kept_for_what_runs_to_decide() -> None:
    """Two lists of layers that cache: one of them may never run."""
    assert sorted(names(ByName(spare=layers(), layers=layers()))) == ["layers", "spare"]


def test_layers_of_other_stages_are_left_out() -> None:
    """They count, and keep their numbers."""
    held = layers()
    held[0] = held[1] = PPMissingLayer()
    (stack,) = find_stacks(ByName(layers=held, norm=PPMissingLayer()), NUM_LAYERS)
    assert (stack.num_layers, list(stack.layers), stack.norms) == (4, [2, 3], ())


def test_layers_in_several_lists_are_refused_by_the_lists() -> None:
    """The message says what there is."""
    model = ByName(high=ByName(layers=layers(2)), low=ByName(layers=layers(2)))
    with pytest.raises(EngineUnsupportedError, match=r"several lists \(high.layers of 2, low.layers of 2\), none of"):
        find_stacks(model, NUM_LAYERS)


def test_a_layer_in_several_places_is_refused() -> None:
    """Every tap of it would see the rows of all of its places."""
    shared = Layer()
    model = ByName(layers=torch.nn.ModuleList([shared, Layer(), shared, Layer()]))
    with pytest.raises(EngineUnsupportedError, match="layers has the same layer in several places"):
        find_stacks(model, NUM_LAYERS)


def test_a_model_without_a_list_is_refused_by_the_number() -> None:
    """As before."""
    with pytest.raises(EngineUnsupportedError, match="ByName has no list of 4 decoder layers"):
        find_stacks(ByName(body=torch.nn.Linear(8, 8)), NUM_LAYERS)


def test_norms_are_told_by_their_weights() -> None:
    """Beside the list or beside what it lies in, whatever they are called; matrices are none."""

    class Rescale(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8))

    class OwnNorm(torch.nn.Module):
        """A norm without weights."""

    inner = ByName(emb=torch.nn.Embedding(9, 8), layers=layers(), ln_out=Rescale(), rope=torch.nn.Identity())
    model = ByName(model=inner, last=OwnNorm(), head=torch.nn.Linear(8, 9))
    (stack,) = find_stacks(model, NUM_LAYERS)
    assert stack.norms == (inner.ln_out, model.last)
