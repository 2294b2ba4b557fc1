"""vLLM's model: its decoder layers, found by structure, and hooks on their methods. Worker process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import torch

from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.vllm.facts import require

NORM_NAMES: Final = ("norm", "final_layernorm", "ln_f", "norm_f", "final_layer_norm", "embedding_norm", "final_norm")
"""Names of the final norm in the owner of the decoder layers, over all model files of 0.32."""

NOT_TEXT: Final = ("visual", "vision", "image", "audio", "speech")


class Model(NamedTuple):
    """Places for taps."""

    layers: dict[int, torch.nn.Module]
    num_layers: int
    final_norm: torch.nn.Module | None
    is_first_stage: bool
    is_last_stage: bool


def find_model(worker: Any) -> Model:
    """Find the decoder layers that this worker holds, by structure.

    Raises:
        EngineUnsupportedError: No decoder layers, or a configuration in which rows cannot be told apart.
    """
    runner = worker.model_runner
    _refuse_config(worker.vllm_config)
    model = require(runner, "get_model")()
    if hasattr(model, "get_language_model"):
        model = model.get_language_model()
    num_layers = int(getattr(runner.model_config.hf_text_config, "num_hidden_layers", 0))
    owner, layers = _decoder(model, num_layers)
    from vllm.distributed import get_pp_group

    group = get_pp_group()
    held = {index: layer for index, layer in enumerate(layers) if type(layer).__name__ != "PPMissingLayer"}
    norms = (getattr(owner, name, None) for name in NORM_NAMES)
    norm = next((norm for norm in norms if isinstance(norm, torch.nn.Module)), None)
    return Model(held, num_layers, norm, group.is_first_rank, group.is_last_rank)


def _refuse_config(config: Any) -> None:
    parallel, cache, compilation = config.parallel_config, config.cache_config, config.compilation_config
    reasons = {
        "microbatching (enable_dbo) runs the model on slices of the batch": getattr(parallel, "enable_dbo", False)
        or getattr(parallel, "num_ubatches", 1) > 1,
        "prefill context parallelism splits the rows of a request over ranks": getattr(
            parallel, "prefill_context_parallel_size", 1
        )
        > 1,
        "kv_sharing_fast_prefill drops rows in the later layers": getattr(cache, "kv_sharing_fast_prefill", False),
        "the sequence parallelism pass (enable_sp) splits the rows between norms": bool(
            getattr(compilation.pass_config, "enable_sp", False)
        ),
        "sequence-parallel experts (enable_expert_parallel with tensor and data parallelism) split the rows of a step "
        "over ranks": getattr(parallel, "use_sequence_parallel_moe", False),
        "enable_adaptive_verification decides on the device which request a row belongs to": getattr(
            config.speculative_config, "enable_adaptive_verification", False
        ),
    }
    for reason, met in reasons.items():
        if met:
            raise EngineUnsupportedError(f"{reason}: turn it off to capture.")


def _decoder(model: torch.nn.Module, num_layers: int) -> tuple[torch.nn.Module, torch.nn.ModuleList]:
    """Find the list of decoder layers: its owner has start_layer and end_layer in all of vLLM's own model files."""
    plain = []
    for name, module in model.named_modules():
        for _, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == num_layers > 0:
                if hasattr(module, "start_layer") and hasattr(module, "end_layer"):
                    return module, child
                if not any(word in name for word in NOT_TEXT):
                    plain.append((name, module, child))
    if not plain:
        raise EngineUnsupportedError(
            f"{type(model).__name__} has no list of {num_layers} decoder layers: this model cannot be tapped."
        )
    # An encoder of text is the model only where nothing decodes, as in BERT.
    _, owner, layers = min(plain, key=lambda found: ("encoder" in found[0], len(found[0])))
    return owner, layers


def tap_outputs(owner: Any, then: Callable[..., None], method: str = "forward", names: tuple[str, ...] = ()) -> None:
    """Call `then` with what a method returns and these of its arguments, inside whatever graph it is compiled into."""
    function = require(owner, method)
    places = [_place(function, name) for name in names]

    @functools.wraps(function)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        then(result, *[_argument(args, kwargs, name, place) for name, place in zip(names, places, strict=True)])
        return result

    setattr(owner, method, tapped)


def tap_inputs(owner: Any, names: tuple[str, ...], then: Callable[..., None], method: str = "forward") -> None:
    """Call `then` with the named arguments of a method (None where absent) before it runs."""
    function = require(owner, method)
    places = [_place(function, name) for name in names]

    @functools.wraps(function)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        then(*[_argument(args, kwargs, name, place) for name, place in zip(names, places, strict=True)])
        return function(*args, **kwargs)

    setattr(owner, method, tapped)


def _place(function: Callable[..., Any], name: str) -> int:
    parameters = list(inspect.signature(function).parameters)
    return parameters.index(name) if name in parameters else -1


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, place: int) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[place] if 0 <= place < len(args) else None
