"""The functions and classes of `easysteer.hidden_states`, over captures. Client process.

Rows are told apart by their labels, never by counting: what a sample gets are the rows of its own tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_tap.client.result import Capture
from vllm_tap.legacy import runs
from vllm_tap.legacy.install import install_vllm_hidden_states

install_vllm_hidden_states()

Layers = dict[int, torch.Tensor]


def get_all_hidden_states(llm: Any, texts: Any, split_by_samples: bool = True) -> tuple[list[Any], list[Any]]:
    """Return the hidden states of texts that `llm` embeds. They live as long as you keep them.

    Args:
        llm: A `vllm.LLM` that embeds.
        texts: Texts, or dicts as `LLM.embed` takes them.
        split_by_samples: Whether to split by text.

    Returns:
        (states, outputs of `LLM.embed`). States are [sample][layer] Tensor [R, D]; not split, [layer] Tensor [T, D],
        text after text. Model dtype, CPU, rows in order of position. They may be views of one result: what
        you write into them shows wherever the same rows are read again.

    Raises:
        TapError: As `vllm_tap.capture`; a SpecError where the engine generates.

    Source:
        Residual stream after each decoder layer, before the final norm.

    Cost:
        As `vllm_tap.capture`; no copy where the rows lie in one block, else one gather a layer. Splitting makes views.
    """
    return _states(runs.embed(llm, texts, runs.HIDDEN), split_by_samples)


def get_all_hidden_states_generate(
    llm: Any, prompts: Any, max_tokens: int = 1, split_by_samples: bool = True, **sampling: Any
) -> tuple[list[Any], list[Any]]:
    """Return the hidden states of prompts and what `llm` generates from them. They live as long as you keep them.

    Args:
        llm: A `vllm.LLM` that generates.
        prompts: Strings, or dicts (`prompt`, `multi_modal_data`, ...) as `LLM.generate` takes them.
        max_tokens: Tokens to generate.
        split_by_samples: Whether to split by prompt.
        **sampling: Fields of `SamplingParams`; the temperature is 0.0 unless given.

    Returns:
        (states, outputs of `LLM.generate`), states as from `get_all_hidden_states`. Rows of a sample are its prompt's
        tokens and the generated ones but the last, which never enters the model.

    Raises:
        TapError: As `vllm_tap.capture`; a SpecError where the engine embeds, and with `n` above 1.

    Source:
        Residual stream after each decoder layer, before the final norm.

    Cost:
        As `get_all_hidden_states`.
    """
    return _states(runs.generate(llm, prompts, runs.HIDDEN, max_tokens, sampling), split_by_samples)


def get_moe_router_logits(llm: Any, texts: Any, split_by_samples: bool = False) -> tuple[Any, list[Any]]:
    """Return the router logits of texts that `llm` embeds. They live as long as you keep them.

    Args:
        llm: A `vllm.LLM` that embeds.
        texts: Texts, or dicts as `LLM.embed` takes them.
        split_by_samples: Whether to split by text.

    Returns:
        (logits, outputs of `LLM.embed`). Logits are {layer: Tensor [T, E]} by the numbers of decoder layers, text after
        text; split, a list of such dicts. A model without experts gives empty dicts. See `get_all_hidden_states` for
        dtype and lifetime.

    Raises:
        TapError: As `vllm_tap.capture`; an EngineUnsupportedError where the model has experts that cannot be tapped.

    Source:
        The gate's output before softmax or sigmoid.

    Cost:
        As `get_all_hidden_states`.
    """
    return _logits(runs.embed(llm, texts, runs.ROUTER), split_by_samples)


def get_moe_router_logits_generate(
    llm: Any, prompts: Any, max_tokens: int = 1, split_by_samples: bool = False, **sampling: Any
) -> tuple[Any, list[Any]]:
    """Return the router logits of prompts and what `llm` generates from them. They live as long as you keep them.

    Args:
        llm: A `vllm.LLM` that generates.
        prompts: Strings, or dicts (`prompt`, `multi_modal_data`, ...) as `LLM.generate` takes them.
        max_tokens: Tokens to generate.
        split_by_samples: Whether to split by prompt.
        **sampling: Fields of `SamplingParams`; the temperature is 0.0 unless given.

    Returns:
        (logits, outputs of `LLM.generate`), logits as from `get_moe_router_logits`, rows as from
        `get_all_hidden_states_generate`.

    Raises:
        TapError: As `get_moe_router_logits`; a SpecError where the engine embeds, and with `n` above 1.

    Source:
        The gate's output before softmax or sigmoid.

    Cost:
        As `get_all_hidden_states`.
    """
    return _logits(runs.generate(llm, prompts, runs.ROUTER, max_tokens, sampling), split_by_samples)


def _states(result: Capture, split: bool) -> tuple[list[Any], list[Any]]:
    layers = _layers(result, "hidden_states")
    if not split:
        return list(layers.values()), result.outputs
    return [list(sample.values()) for sample in _samples(result, layers)], result.outputs


def _logits(result: Capture, split: bool) -> tuple[Any, list[Any]]:
    layers = _layers(result, "router_logits")
    return (_samples(result, layers) if split else layers), result.outputs


def _layers(result: Capture, stream: str) -> Layers:
    return {layer: result.rows(stream, layer) for layer in result.layers.get(stream, ())}


def _samples(result: Capture, layers: Layers) -> list[Layers]:
    """Cut the rows of each layer into views, one a sample."""
    counts = [len(sample) for sample in result]
    cut = {layer: rows.split(counts) for layer, rows in layers.items()}
    return [{layer: views[number] for layer, views in cut.items()} for number in range(len(counts))]


class HiddenStatesCaptureV1:
    """`get_all_hidden_states` as a class."""

    def get_all_hidden_states(self, llm: Any, texts: Any, split_by_samples: bool = True) -> tuple[list[Any], list[Any]]:
        """Return what the function of this name returns."""
        return get_all_hidden_states(llm, texts, split_by_samples)


class HiddenStatesCaptureGenerate:
    """`get_all_hidden_states_generate` as a class."""

    def get_all_hidden_states_generate(
        self, llm: Any, prompts: Any, max_tokens: int = 1, split_by_samples: bool = True, **sampling: Any
    ) -> tuple[list[Any], list[Any]]:
        """Return what the function of this name returns."""
        return get_all_hidden_states_generate(llm, prompts, max_tokens, split_by_samples, **sampling)


class MoERouterLogitsCaptureV1:
    """`get_moe_router_logits` as a class."""

    def get_router_logits(self, llm: Any, texts: Any, split_by_samples: bool = False) -> tuple[Any, list[Any]]:
        """Return what `get_moe_router_logits` returns."""
        return get_moe_router_logits(llm, texts, split_by_samples)


class MoERouterLogitsCaptureGenerate:
    """`get_moe_router_logits_generate` as a class."""

    def get_router_logits_generate(
        self, llm: Any, prompts: Any, max_tokens: int = 1, split_by_samples: bool = False, **sampling: Any
    ) -> tuple[Any, list[Any]]:
        """Return what `get_moe_router_logits_generate` returns."""
        return get_moe_router_logits_generate(llm, prompts, max_tokens, split_by_samples, **sampling)
