"""Lists that can be the decoder layers of a model, and modules that can be its final norm. Worker process.

Names say little: a model may call its norm anything, and hold other lists that are as long. So everything that fits is
found here, best first, and what runs decides between those (see `engine.model.install`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Final, NamedTuple

import torch

from vllm_tap.errors import EngineUnsupportedError

LISTS: Final = (torch.nn.ModuleList, torch.nn.Sequential, torch.nn.ModuleDict)

NOT_TEXT: Final = ("visual", "vision", "image", "audio", "speech")
"""Names of parts that layers of other media lie in, where nothing better tells."""

_ABSENT: Final = "PPMissingLayer"
"""The module that vLLM puts in the place of a layer that another pipeline stage has."""


class Stack(NamedTuple):
    """A list of modules that may be the decoder layers.

    Attributes:
        name: Its path in the model.
        layers: Those that this worker holds, by number.
        num_layers: All of them, over all pipeline stages.
        norms: Modules beside the list, or beside what it lies in, that may be the norm behind it.
    """

    name: str
    layers: dict[int, torch.nn.Module]
    num_layers: int
    norms: tuple[torch.nn.Module, ...]

    def __str__(self) -> str:
        """Return one line for people."""
        kinds = dict.fromkeys(type(layer).__name__ for layer in self.layers.values())
        return f"{self.name}, {self.num_layers} of {' and '.join(kinds) or 'other stages'}"


class _Found(NamedTuple):
    name: str
    owners: tuple[torch.nn.Module, ...]  # from the one that holds the list up to the model
    modules: tuple[torch.nn.Module, ...]

    @property
    def has_caches(self) -> bool:
        # Every layer of vLLM that keeps something of the tokens before has this method: attention of all kinds, Mamba.
        return any(hasattr(part, "get_kv_cache_spec") for module in self.modules for part in module.modules())

    @property
    def has_bounds(self) -> bool:
        """True if it is cut into pipeline stages, as in vLLM's own model files."""
        return hasattr(self.owners[0], "start_layer") and hasattr(self.owners[0], "end_layer")

    @property
    def num_weights(self) -> int:
        return sum(weight.numel() for module in self.modules for weight in module.parameters())


def find_stacks(model: torch.nn.Module, num_layers: int) -> tuple[Stack, ...]:
    """Find the lists that may be the decoder layers; usually there is one. More are equals, the best first.

    Decoder layers keep something of the tokens before, which a list of adapters, or an encoder of sound, does not.

    Args:
        model: The model, or its part for text.
        num_layers: How many the configuration says there are, which for a model with an encoder may be that one's.

    Raises:
        EngineUnsupportedError: There is none.
    """
    found = list(_lists(model))
    caching = _outermost([one for one in found if one.has_caches])
    fitting = [one for one in caching if len(one.modules) == num_layers]
    if not fitting and len(caching) == 1:
        fitting = caching
    if not caching:
        fitting = _likeliest(_outermost([one for one in found if len(one.modules) == num_layers]))
    if not fitting:
        raise EngineUnsupportedError(_none(model, num_layers, caching))
    fitting.sort(key=lambda one: (one.has_bounds, one.num_weights), reverse=True)
    return tuple(_stack(one) for one in fitting)


def _likeliest(found: list[_Found]) -> list[_Found]:
    """Choose among lists of which none caches, as where vLLM's Transformers backend does that elsewhere."""
    likely = [one for one in found if one.has_bounds or not any(word in one.name for word in NOT_TEXT)]
    # An encoder of text is the model only where nothing decodes.
    return sorted(likely, key=lambda one: (one.has_bounds, "encoder" not in one.name, one.num_weights))[-1:]


def _lists(model: torch.nn.Module) -> Iterable[_Found]:
    owners = dict[str, torch.nn.Module]()
    for name, module in model.named_modules():
        owners[name] = module
        for child_name, child in module.named_children():
            if isinstance(child, LISTS) and len(child):
                parts = name.split(".") if name else []
                above = [".".join(parts[:depth]) for depth in range(len(parts), -1, -1)]
                path = f"{name}.{child_name}".lstrip(".")
                # Not `children`, which leaves out a module that comes again.
                modules = tuple(module for module in child._modules.values() if module is not None)
                yield _Found(path, tuple(owners[owner] for owner in above), modules)


def _outermost(found: list[_Found]) -> list[_Found]:
    """Leave out lists that lie in a module of another one, such as the parts of a layer."""
    return [
        one for one in found if not any(one is not other and one.name.startswith(f"{other.name}.") for other in found)
    ]


def _none(model: torch.nn.Module, num_layers: int, caching: list[_Found]) -> str:
    kind = type(model).__name__
    if not caching:
        return f"{kind} has no list of {num_layers} decoder layers: this model cannot be tapped."
    lists = ", ".join(f"{one.name} of {len(one.modules)}" for one in caching)
    return (
        f"{kind} has its decoder layers in several lists ({lists}), none of the {num_layers} that its configuration "
        "says: which rows are those of a layer cannot be told."
    )


def _stack(one: _Found) -> Stack:
    held = {index: layer for index, layer in enumerate(one.modules) if type(layer).__name__ != _ABSENT}
    if len(set(held.values())) < len(held):
        raise EngineUnsupportedError(
            f"{one.name} has the same layer in several places: which of its rows are those of a place cannot be told."
        )
    beside = itertools.chain.from_iterable(owner.children() for owner in one.owners)
    norms = [module for module in dict.fromkeys(beside) if may_be_norm(module)]
    return Stack(one.name, held, len(one.modules), tuple(norms))


def may_be_norm(module: torch.nn.Module) -> bool:
    """Tell whether a module could be a norm: it has vectors alone, or nothing and such a name."""
    if type(module).__name__ == _ABSENT or any(isinstance(part, LISTS) for part in module.modules()):
        return False  # what holds layers may have vectors alone, too: some kernels keep their weights elsewhere
    weights = list(module.parameters())
    return all(weight.dim() == 1 for weight in weights) if weights else "norm" in type(module).__name__.lower()
