"""The experts of a decoder layer, and what their router states.

Runs in the worker process. Imports nothing of vLLM; `assumptions` lists the names.
"""

from __future__ import annotations

import inspect
from typing import Any, Final, NamedTuple

import torch

from vllm_tap.frame.routing import Routing, unknown
from vllm_tap.vllm import facts


class Experts(NamedTuple):
    """The mixture of experts of a decoder layer.

    `runner` has the method `_maybe_dispatch(hidden_states, router_logits)`, which every model's true logits pass once;
    `router` has `select_experts(hidden_states, router_logits, ...)`, which returns weights and ids as chosen, of the
    rows of the step unless `hides_choice` says what is done instead. `num_experts` counts replicas too, of which the
    ids may be; `num_logits` are what a router tells apart.
    """

    runner: Any
    router: Any
    num_experts: int
    num_logits: int
    has_fused_gate: bool
    hides_choice: str


def find_experts(layer: torch.nn.Module) -> Experts | None:
    """Find the experts of a decoder layer, or None if it has none."""
    for module in layer.modules():
        if hasattr(module, "_maybe_dispatch") and hasattr(module, "moe_config"):
            config: Any = module.moe_config
            fused = bool(getattr(module, "_fse_fuse_gate", False))
            method = getattr(getattr(module, "routed_experts", None), "quant_method", None)
            hides_choice = ""
            if getattr(method, "is_monolithic", False):
                hides_choice = f"lets a kernel ({type(method).__name__}) choose, which returns neither ids nor weights"
            elif getattr(module, "do_naive_dispatch_combine", False):
                hides_choice = "gathers the rows of all data parallel engines before it chooses"
            num_experts = int(config.num_experts)
            num_logits = int(getattr(config, "num_logical_experts", num_experts))
            return Experts(module, getattr(module, "router", None), num_experts, num_logits, fused, hides_choice)
    return None


READABLE_ROUTERS: Final = ("FusedTopKRouter", "FusedTopKBiasRouter", "GroupedTopKRouter", "CPURouter")
"""The classes of vLLM's routers that do nothing beside what their attributes say, in all supported versions."""

OTHER_WAYS: Final = {
    "custom_routing_function": "a function of the model chooses",
    "_hash_indices_table": "experts are looked up by token id",
    "bias_vl": "image tokens have a bias of their own",
    "eplb_state": "load balancing (EPLB) puts numbers of replicas in the place of experts",
}
"""Attributes by which a router does something else, and what."""


def leaves_logits(experts: Experts) -> bool:
    """Tell whether the logits of a step still are what the gate made when its experts have been chosen."""
    router = experts.router
    if type(router).__name__ not in READABLE_ROUTERS or getattr(router, "custom_routing_function", None) is not None:
        return False
    return "router_logits" in inspect.signature(router.select_experts).parameters


READ_ONLY_KERNELS: Final = ("TritonExperts",)
"""Classes of vLLM's kernels of experts that write to nothing that is given to them, in all supported versions."""


def keeps_tensors(experts: Experts) -> bool:
    """Tell whether logits, ids and weights of a step stay as they are for as long as somebody holds their tensors.

    The runner has to make the logits itself: memory of a compiled graph may serve again while its tensor is held.
    """
    routed = getattr(experts.runner, "routed_experts", None)
    method = getattr(routed, "quant_method", None)
    kernel = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    return (
        getattr(experts.runner, "gate", None) is not None
        and type(routed).__name__ == "RoutedExperts"  # that of 0.33 which substitutes experts writes other ids
        and type(kernel).__name__ in READ_ONLY_KERNELS
    )


def bias_of(experts: Experts) -> torch.Tensor | None:
    """Return the tensor by which a router chooses beside its scores, as it is now; None without one."""
    bias = getattr(experts.router, "e_score_correction_bias", None)
    return bias if isinstance(bias, torch.Tensor) else None


def read_routing(experts: Experts) -> Routing:
    """Return what a router states about how it chooses; `routing.confirm` finds out whether it is so."""
    name = type(experts.router).__name__
    if name not in READABLE_ROUTERS:
        return unknown(f"vLLM's {name} is not a router whose settings this package reads")
    for attribute, meaning in OTHER_WAYS.items():
        if getattr(experts.router, attribute, None) is not None:
            return unknown(meaning)
    if getattr(experts.router, "num_fused_shared_experts", 0):
        return unknown("shared experts stand among the chosen ones")
    try:
        return _stated(experts.router, experts.runner)
    except AttributeError as error:
        return unknown(f"vLLM {facts.vllm_version()}: {error}")


def _stated(router: Any, runner: Any) -> Routing:
    # The router for processors leaves out bias and factor of softmax scores, unless experts are grouped.
    is_plain = not getattr(router, "use_grouped_topk", True) and router.scoring_func == "softmax"
    bias = None if is_plain else getattr(router, "e_score_correction_bias", None)
    return Routing(
        scoring=router.scoring_func,
        num_chosen=router.top_k,
        renormalized=bool(router.renormalize),
        bias=() if bias is None else tuple(bias.float().tolist()),
        num_groups=getattr(router, "num_expert_group", None) or 1,
        num_chosen_groups=getattr(router, "topk_group", None) or 1,
        scale=1.0 if is_plain else float(getattr(router, "routed_scaling_factor", 1.0)),
        output_scale=float(getattr(runner, "routed_scaling_factor", 1.0)),
    )
