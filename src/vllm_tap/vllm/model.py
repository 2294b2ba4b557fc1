"""vLLM's model: its decoder layers, found by structure, and hooks on their methods. Worker process."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vllm_tap.errors import EngineUnsupportedError
from vllm_tap.vllm.decoder import Stack, find_stacks
from vllm_tap.vllm.facts import require


class Model(NamedTuple):
    """Places for taps.

    Attributes:
        stacks: Lists that may be the decoder layers, the likeliest first; usually one.
        width: Width of a row of the residual stream, by the configuration; 0 if it does not say.
        fuses_reduction: Why no block may be tapped, where the compiler makes one kernel of its last step and what comes
            behind it: a tap in between would undo that, also while nobody captures. Empty where it does not.
    """

    stacks: tuple[Stack, ...]
    width: int
    is_first_stage: bool
    is_last_stage: bool
    fuses_reduction: str = ""


def find_model(worker: Any) -> Model:
    """Find what may be the decoder layers that this worker holds, by structure.

    Raises:
        EngineUnsupportedError: No decoder layers, or a configuration in which rows cannot be told apart.
    """
    runner = worker.model_runner
    _refuse_config(worker.vllm_config)
    model = require(runner, "get_model")()
    if hasattr(model, "get_language_model"):
        model = model.get_language_model()
    config = runner.model_config.hf_text_config
    stacks = find_stacks(model, int(getattr(config, "num_hidden_layers", 0) or 0))
    from vllm.distributed import get_pp_group

    group = get_pp_group()
    width = int(getattr(config, "hidden_size", 0) or 0)
    return Model(stacks, width, group.is_first_rank, group.is_last_rank, _fuses_reduction(worker.vllm_config))


def _fuses_reduction(config: Any) -> str:
    fuses = getattr(config.compilation_config.pass_config, "fuse_allreduce_rms", False)
    if not fuses or config.parallel_config.tensor_parallel_size == 1:
        return ""
    return (
        "the compiler joins the sum over ranks with the norm behind it (fuse_allreduce_rms). Start the engine with "
        'compilation_config={"pass_config": {"fuse_allreduce_rms": False}}'
    )


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


def tap_entry(layer: torch.nn.Module, width: int, then: Callable[[Any, Any], None]) -> None:
    """Call `then` with the stream that a layer is given, and with what is to be added to it or None, before it runs.

    By name where the layer has an argument `hidden_states`, as nearly all of vLLM's have; else the stream is its only
    tensor of the stream's width, beside one that is called `residual`. If there are more, `then` is not called.
    """
    if "hidden_states" in inspect.signature(layer.forward).parameters:
        tap_inputs(layer, ("hidden_states", "residual"), lambda hidden, residual: _pass_on(then, hidden, residual))
        return
    function = layer.forward
    place = _place(function, "residual")

    @functools.wraps(function)
    def tapped(*args: Any, **kwargs: Any) -> Any:
        residual = _argument(args, kwargs, "residual", place)
        rows = [given for given in (*args, *kwargs.values()) if given is not residual and is_rows(given, width)]
        if len(rows) == 1:
            then(rows[0], residual)
        return function(*args, **kwargs)

    layer.forward = tapped


def _pass_on(then: Callable[[Any, Any], None], hidden: Any, residual: Any) -> None:
    if hidden is not None:
        then(hidden, residual)


def is_rows(given: Any, width: int = 0) -> bool:
    """Tell whether something is a tensor of rows, of a width if that is known."""
    if not isinstance(given, torch.Tensor) or not given.is_floating_point() or given.dim() < 2:
        return False
    return width in (0, given.shape[-1])


def _place(function: Callable[..., Any], name: str) -> int:
    parameters = list(inspect.signature(function).parameters)
    return parameters.index(name) if name in parameters else -1


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, place: int) -> Any:
    if name in kwargs:
        return kwargs[name]
    return args[place] if 0 <= place < len(args) else None
