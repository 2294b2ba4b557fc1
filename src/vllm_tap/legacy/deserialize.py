"""Functions that users import as `vllm.hidden_states`: payloads to tensors, summaries, and a test for experts.

Runs in the client.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import torch

from vllm_tap.errors import SpecError
from vllm_tap.legacy.payload import deserialize

BEFORE_NUMBER: Final = frozenset({"layers", "layer", "h", "blocks", "block"})
"""Names of the lists in which model code keeps its decoder layers."""


def deserialize_hidden_states(payload: Mapping[Any, Any]) -> dict[int, torch.Tensor]:
    """Turn one worker's payload of hidden states into tensors that own their memory.

    Returns:
        Tensor by layer, shape and dtype as stored, CPU; layers ascend.

    Raises:
        DescriptorError: the payload does not validate.

    Source:
        Residual stream after each decoder layer, as the worker stored it.

    Cost:
        One copy. For more than 1 GiB of lists or compressed layers call `payload.deserialize` with a limit.
    """
    return deserialize(payload)


def deserialize_moe_router_logits(payload: Mapping[Any, Any]) -> dict[int, torch.Tensor]:
    """Turn one worker's payload of router logits into tensors that own their memory.

    Returns:
        Tensor [T, E] by decoder layer, dtype as stored, CPU; layers ascend.

    Raises:
        DescriptorError: the payload does not validate.

    Source:
        Gate output before softmax or sigmoid, as the worker stored it.

    Cost:
        One copy. For more than 1 GiB of lists or compressed layers call `payload.deserialize` with a limit.
    """
    return deserialize(payload)


def print_hidden_states_summary(states: Mapping[int, torch.Tensor]) -> None:
    """Print how many layers there are, then shape, dtype and device of each."""
    print(f"Captured {len(states)} layers:")
    for layer, tensor in sorted(states.items()):
        print(f"  Layer {layer:2d}: shape {tuple(tensor.shape)}, dtype {tensor.dtype}, device {tensor.device}")


def print_moe_router_logits_summary(logits: Mapping[int, torch.Tensor]) -> None:
    """Print how many layers there are, then tokens, experts, dtype and device of each.

    Raises:
        SpecError: a tensor is not [T, E]. Nothing is printed then.
    """
    for layer, tensor in logits.items():
        if tensor.dim() != 2:
            raise SpecError(f"layer {layer}: expected router logits [T, E], got {tuple(tensor.shape)}", layer=layer)
    print(f"Captured {len(logits)} MoE layers:")
    for layer, tensor in sorted(logits.items()):
        num_tokens, num_experts = tensor.shape
        print(
            f"  Layer {layer:2d}: {num_tokens} tokens x {num_experts} experts, "
            f"dtype {tensor.dtype}, device {tensor.device}"
        )


def is_moe_layer(module: object, name: str = "") -> bool:
    """Tell whether `module` holds a router (`gate` or `router`) and the `experts` it chooses from.

    The structure decides; `name` is taken because the old function took it.
    """
    has_router = any(getattr(module, router, None) is not None for router in ("gate", "router"))
    return has_router and getattr(module, "experts", None) is not None


def extract_moe_layer_id_from_name(name: str) -> int | None:
    """Return the decoder layer that a module's dotted name states, e.g. 10 for `model.layers.10.mlp`, or None.

    The first number after a list of layers counts: the 3 of `layers.10.mlp.experts.3` is an expert.
    """
    parts = name.split(".")
    for before, part in pairwise(parts):
        if before.lower() in BEFORE_NUMBER and part.isascii() and part.isdigit():
            return int(part)
    return None
