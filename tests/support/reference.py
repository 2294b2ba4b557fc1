"""Runs a Hugging Face model in float32 with eager attention and keeps what the engine's taps are compared against.

Runs in the test process. Everything is found by structure, so a new family needs no code here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import device

ATTENTION = (
    "post_norm1",
    "post_self_attn_layernorm",
    "post_attention_layernorm",
    "self_attn",
    "self_attention",
    "attention",
    "attn",
)
ATTENTION += ("linear_attn", "mamba", "conv", "mixer")
MLPS = (
    "post_norm2",
    "post_mlp_layernorm",
    "post_feedforward_layernorm",
    "mlp",
    "feed_forward",
    "block_sparse_moe",
    "fc2",
)
"""Modules of Hugging Face's layers whose output is added, the norms behind blocks first."""

NUM_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Reference:
    """What one forward pass over one sequence gives; all float32, on the CPU, rows in order of position.

    Attributes:
        hidden_states: [L, T, D], the residual stream after each decoder layer, before the final norm.
        embedding: [T, D], the residual stream before layer 0.
        final_normed: [T, D], the state that the language head reads.
        logits: [T, V].
        router_logits: layer -> [T, E], before softmax or sigmoid; only layers that have experts.
        attention_output: layer -> [T, D], what attention adds to the residual stream, where a module gives it.
        mlp_output: The same of the MLP or the experts.
    """

    hidden_states: Tensor
    embedding: Tensor
    final_normed: Tensor
    logits: Tensor
    router_logits: dict[int, Tensor]
    attention_output: dict[int, Tensor] = field(default_factory=dict)
    mlp_output: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class _Seen:
    embedding: list[Tensor] = field(default_factory=list)
    layers: dict[int, Tensor] = field(default_factory=dict)
    routers: dict[int, Tensor] = field(default_factory=dict)
    attention: dict[int, Tensor] = field(default_factory=dict)
    mlps: dict[int, Tensor] = field(default_factory=dict)
    head_input: list[Tensor] = field(default_factory=list)


class ReferenceModel:
    """A Hugging Face model on the device of the tests: in float32, whatever dtype it was saved in, or as told."""

    def __init__(self, folder: Path | str, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.model = self.load(folder).eval().to(device.NAME)
        self.layers = decoder_layers(self.model)
        self.routers = {i: gate for i, layer in enumerate(self.layers) if (gate := router(layer, self.model.config))}

    def load(self, folder: Path | str) -> Any:
        """Return the model."""
        from transformers import AutoModelForCausalLM

        # Experts one by one: faster ways of some versions round otherwise on a GPU, or take bfloat16 alone.
        ways = {"attn_implementation": "eager", **({"experts_implementation": "eager"} if device.ON_CUDA else {})}
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype, **ways)

    def tensor(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return token ids as the model takes them."""
        return torch.tensor(token_ids, device=device.NAME)

    def run(self, token_ids: Sequence[int], **inputs: Any) -> Reference:
        """Run one sequence from its beginning, without a cache; `inputs` are what the model takes beside tokens.

        Returns:
            Reference with T = len(token_ids); its tensors share no memory with the model.

        Source:
            Forward hooks on the decoder layers, the routers and the language head.
        """
        with torch.inference_mode(), self._watch() as seen:
            output = self.model(self.tensor([list(token_ids)]), use_cache=False, **inputs)
        return Reference(
            hidden_states=torch.stack([seen.layers[i] for i in range(len(self.layers))]),
            embedding=seen.embedding[0],
            final_normed=seen.head_input[0],
            logits=output.logits[0].float().cpu().clone(),
            router_logits=seen.routers,
            attention_output=seen.attention,
            mlp_output=seen.mlps,
        )

    def run_batch(self, sequences: Sequence[Sequence[int]]) -> list[Reference]:
        """Run several sequences in one pass, padded on the right, where causal attention never looks.

        Returns:
            What `run` returns for each of them, but for rounding; the tensors are views of the whole batch.

        Source:
            See `run`.
        """
        longest = max(map(len, sequences))
        padded = self.tensor([[*token_ids, *[0] * (longest - len(token_ids))] for token_ids in sequences])
        with torch.inference_mode(), self._watch() as seen:
            logits = self.model(padded, use_cache=False).logits.float().cpu()
        hidden_states = torch.stack([seen.layers[i] for i in range(len(self.layers))])
        return [
            Reference(
                hidden_states=hidden_states[:, start:stop],
                embedding=seen.embedding[0][start:stop],
                final_normed=seen.head_input[0][start:stop],
                logits=logits.flatten(0, 1)[start:stop],
                router_logits={layer: rows[start:stop] for layer, rows in seen.routers.items()},
                attention_output={layer: rows[start:stop] for layer, rows in seen.attention.items()},
                mlp_output={layer: rows[start:stop] for layer, rows in seen.mlps.items()},
            )
            for start, stop in ((n * longest, n * longest + len(ids)) for n, ids in enumerate(sequences))
        ]

    def greedy(self, token_ids: Sequence[int], max_tokens: int) -> list[int]:
        """Return the `max_tokens` tokens that greedy decoding appends; stops at no token, keeps no cache."""
        known = list(token_ids)
        with torch.inference_mode():
            for _ in range(max_tokens):
                logits = self.model(self.tensor([known]), use_cache=False).logits
                known.append(int(logits[0, -1].argmax()))
        return known[len(token_ids) :]

    @contextmanager
    def _watch(self) -> Iterator[_Seen]:
        seen = _Seen()
        with ExitStack() as hooks:
            hooks.enter_context(
                self.layers[0].register_forward_pre_hook(
                    lambda _, args, kwargs: seen.embedding.append(_rows(_first(args, kwargs))), with_kwargs=True
                )
            )
            hooks.enter_context(
                self.model.get_output_embeddings().register_forward_pre_hook(
                    lambda _, args: seen.head_input.append(_rows(args[0]))
                )
            )
            for i, layer in enumerate(self.layers):
                hooks.enter_context(layer.register_forward_hook(_keep(seen.layers, i)))
                scale = getattr(layer, "residual_multiplier", 1.0)
                for names, into in ((ATTENTION, seen.attention), (MLPS, seen.mlps)):
                    block = adding_module(layer, names)
                    if block is not None:
                        hooks.enter_context(block.register_forward_hook(_keep(into, i, scale)))
            for i, gate in self.routers.items():
                hooks.enter_context(gate.register_forward_hook(_keep(seen.routers, i)))
            yield seen


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the one ModuleList that has an entry for each hidden layer of the (text) configuration."""
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers]
    if len(found) != 1:
        raise LookupError(f"{type(model).__name__} has {len(found)} module lists of {num_layers} entries, expected one")
    return found[0]


def router(layer: nn.Module, config: Any) -> nn.Module | None:
    """Return the module of a decoder layer that scores the experts, or None where the layer is dense.

    It is the one whose own weight is [E, D].
    """
    text = config.get_text_config(decoder=True)
    num_experts = next((n for name in NUM_EXPERTS_NAMES if (n := getattr(text, name, None))), None)
    if num_experts is None:
        return None
    shape = (num_experts, text.hidden_size)
    found = [m for m in layer.modules() if tuple(getattr(getattr(m, "weight", None), "shape", ())) == shape]
    if len(found) > 1:
        raise LookupError(f"{type(layer).__name__} has {len(found)} weights of shape {shape}, expected one router")
    return found[0] if found else None


def adding_module(layer: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """Return the first of the named modules of a layer, whose output the layer adds to the residual stream."""
    children = dict(layer.named_children())
    norms = [name for name in children if name.startswith("post") and "norm" in name]
    if not any(word in name for name in norms for word in ("feedforward", "mlp", "norm2")):
        children = {name: child for name, child in children.items() if not name.startswith("post")}
    return next((children[name] for name in names if name in children), None)


def _keep(into: dict[int, Tensor], index: int, scale: float = 1.0) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        into[index] = _rows(output if isinstance(output, Tensor) else output[0]) * scale

    return hook


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _rows(states: Tensor) -> Tensor:
    return states.detach().reshape(-1, states.shape[-1]).float().to("cpu", copy=True)
