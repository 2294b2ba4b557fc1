"""The blocks of a decoder layer: what mixes tokens, what does not, and the norms behind them. Worker process.

Found by structure. What they hand to the residual stream is confirmed by rows, see `engine.model.blocks`. Imports
nothing of vLLM; `assumptions` lists the names.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

import torch

from vllm_tap.vllm.decoder import LISTS, may_be_norm
from vllm_tap.vllm.model import is_rows, tap_outputs

ATTENTION: Final = "attention_output"
MLP: Final = "mlp_output"

_ATTENTION_WORDS: Final = re.compile(r"att(n|ention)|mixer")
_MLP_WORDS: Final = re.compile(r"feed_?forward|mlp|ffn|moe|experts|(^|_)ff($|_)")
_NUMBERED: Final = ("post_norm1", "post_norm2")
"""Names of norms behind blocks that do not say behind which."""

_OUTPUT: Final = "output"
"""The argument into which some blocks write instead of returning anything."""


class Block(NamedTuple):
    """A module whose rows may be what a block hands to the residual stream.

    Attributes:
        stream: The stream that they would be.
        name: The module's, in its layer.
        module: It.
        scale: What the layer multiplies its rows by before it adds them.
        is_norm: Whether it is a norm behind a block.
    """

    stream: str
    name: str
    module: torch.nn.Module
    scale: float = 1.0
    is_norm: bool = False

    def __str__(self) -> str:
        """Return its name, with the scale where there is one."""
        return self.name if self.scale == 1 else f"{self.name} * {self.scale:.6g}"


class Blocks(NamedTuple):
    """The blocks of a layer, in the order of the layer's modules, and norms that may stand behind them."""

    blocks: tuple[Block, ...]
    norms: tuple[Block, ...]


def find_blocks(layer: torch.nn.Module) -> Blocks:
    """Find the blocks of a decoder layer by the modules that it holds."""
    children = dict(_children(layer))
    norms = {name: child for name, child in children.items() if may_be_norm(child) and not _has_matrices(child)}
    mixers = _mixers({name: child for name, child in children.items() if name not in norms})
    others = {name: child for name, child in children.items() if name not in norms and name not in mixers}
    scale = _scale(layer)
    blocks = [Block(ATTENTION, name, child, scale) for name, child in mixers.items()]
    blocks += [Block(MLP, name, child, scale) for name, child in _mlps(others).items()]
    return Blocks(tuple(blocks), tuple(_norms_behind(norms, scale)))


def _children(layer: torch.nn.Module) -> Iterable[tuple[str, torch.nn.Module]]:
    for name, child in layer.named_children():
        if isinstance(child, LISTS):
            yield from ((f"{name}.{part}", module) for part, module in child.named_children())
        else:
            yield name, child


def _mixers(children: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """Choose those that keep something of the tokens before; by name where vLLM's Transformers backend does that."""
    caching = {name: child for name, child in children.items() if _holds(child, "get_kv_cache_spec")}
    return caching or {name: child for name, child in children.items() if _ATTENTION_WORDS.search(name)}


def _mlps(children: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Module]:
    """Choose those that hold experts or matrices; of matrices that lie in the layer itself, the last one."""
    composite, single = {}, {}
    for name, child in children.items():
        if _holds(child, "_maybe_dispatch") or (_has_matrices(child) and _is_composite(child)):
            composite[name] = child
        elif _has_matrices(child):
            single[name] = child
    return composite or dict(list(single.items())[-1:])


def _norms_behind(norms: dict[str, torch.nn.Module], scale: float) -> Iterable[Block]:
    """Choose the norms behind blocks, in layers that have such: one that names the MLP tells them.

    `post_attention_layernorm` alone does not: in most families it stands before the MLP.
    """
    behind = {name: norm for name, norm in norms.items() if name.startswith("post")}
    if tuple(behind)[-2:] == _NUMBERED:
        for stream, name in zip((ATTENTION, MLP), _NUMBERED, strict=True):
            yield Block(stream, name, behind[name], scale, True)
    elif any(_MLP_WORDS.search(name) for name in behind):
        for name, norm in behind.items():
            if _MLP_WORDS.search(name) or _ATTENTION_WORDS.search(name):
                yield Block(MLP if _MLP_WORDS.search(name) else ATTENTION, name, norm, scale, True)


def _scale(layer: torch.nn.Module) -> float:
    """Return what a layer multiplies the rows of its blocks by, as the families do that have such a number."""
    scale = getattr(layer, "residual_multiplier", None)
    config: Any = getattr(layer, "config", None)
    depth = getattr(config, "scale_depth", None)
    if scale is None and depth is not None:
        scale = depth / math.sqrt(config.num_hidden_layers)
    return float(scale) if isinstance(scale, int | float) else 1.0


def _bias(result: Any, rows: torch.Tensor) -> torch.Tensor | None:
    bias = result[1] if isinstance(result, tuple) and len(result) == 2 else None
    if isinstance(bias, torch.Tensor) and bias.shape == rows.shape[-1:]:
        return bias.expand_as(rows)
    return None


def _holds(module: torch.nn.Module, name: str) -> bool:
    return any(hasattr(part, name) for part in module.modules())


def _has_matrices(module: torch.nn.Module) -> bool:
    # Some kernels keep the weights of vLLM's linear layers elsewhere: these have a method for them.
    return any(weight.dim() > 1 for weight in module.parameters()) or _holds(module, "quant_method")


def _is_composite(module: torch.nn.Module) -> bool:
    return any(_has_matrices(child) for child in module.children())


def tap_block(block: Block, width: int, then: Callable[[torch.Tensor, torch.Tensor | None], None]) -> None:
    """Call `then` with the rows that a block hands to the residual stream, inside whatever graph it is compiled into.

    And with what the layer adds to them, where a block returns a bias beside its rows, or None.

    A norm that adds as well, and so returns two tensors, stands before a block and not behind one.
    """

    def pass_on(result: Any, output: Any) -> None:
        if block.is_norm and isinstance(result, tuple):
            return
        rows = result[0] if isinstance(result, tuple | list) and result else output if result is None else result
        if is_rows(rows, width):
            then(rows if block.scale == 1 else rows * block.scale, _bias(result, rows))

    tap_outputs(block.module, pass_on, names=(_OUTPUT,))
