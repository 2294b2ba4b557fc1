"""Runs prompts for the old interface: prompts, parameters and outputs as it had them. Client process."""

from __future__ import annotations

from typing import Any

from vllm_tap.client import capture as new
from vllm_tap.client.connection import connect
from vllm_tap.client.result import Capture
from vllm_tap.errors import EngineUnsupportedError, SpecError
from vllm_tap.spec import Spec
from vllm_tap.vllm import frontend

HIDDEN = Spec(hidden_states="all")
ROUTER = Spec(router_logits="all", missing="skip")


def embed(llm: Any, texts: Any, spec: Spec) -> Capture:
    """Pool texts and capture; `outputs` are those of `llm.embed`, or of `llm.classify` where the model classifies.

    Raises:
        SpecError: The engine generates.
    """
    frontend.require_llm(llm)
    if not frontend.pools(llm):
        raise SpecError(
            "this engine generates and does not embed: call the function that ends in _generate, or start it with "
            'LLM(..., runner="pooling", convert="embed").'
        )
    result = _capture(llm, texts, spec, frontend.new_params(llm, {}))
    kind = frontend.output_kind(llm)
    if kind is not None:
        result.outputs[:] = [kind.from_base(output) for output in result.outputs]
    return result


def generate(llm: Any, prompts: Any, spec: Spec, max_tokens: int, sampling: dict[str, Any]) -> Capture:
    """Generate, greedily unless told otherwise, and capture.

    Raises:
        SpecError: The engine embeds, or more than one completion a prompt is asked for.
    """
    frontend.require_llm(llm)
    if frontend.pools(llm):
        raise SpecError("this engine embeds and does not generate: call the function without _generate.")
    if sampling.get("n") not in (None, 1):
        raise SpecError(
            f"n={sampling['n']}: a sample here is one sequence. Use vllm_tap.capture, whose samples have all."
        )
    params = frontend.new_params(llm, {"temperature": 0.0, "max_tokens": max_tokens, **sampling})
    return _capture(llm, prompts, spec, params)


def _capture(llm: Any, prompts: Any, spec: Spec, params: Any) -> Capture:
    if "router_logits" in spec.streams:
        _check_experts(llm)
    return new.capture(llm, prompts, spec, sampling_params=params)


def _check_experts(llm: Any) -> None:
    """Refuse a model whose experts were not found; one that has none is not refused."""
    num_experts = llm.model_config.get_num_experts()
    if num_experts and not connect(llm).available("router_logits"):
        raise EngineUnsupportedError(
            f"this model has {num_experts} experts and none of its layers shows router logits here: run "
            "`vllm-tap doctor` with it and report it."
        )
