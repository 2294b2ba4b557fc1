"""Token types of pairs of texts, from prompts into the pooling parameters that vLLM reads. Client process."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from vllm_tap.errors import SpecError

READERS: Final = re.compile(r"(Bert|Roberta|XLMRoberta)For(Sequence|Token)Classification")
"""Architectures of the supported versions that read token types; others are given none, or fail with the engine."""

FIELD: Final = "compressed_token_type_ids"
"""Key of `PoolingParams.extra_kwargs` under which the runner finds where the second text begins."""


def with_types(llm: Any, prompts: Sequence[Any], params: list[Any]) -> list[Any]:
    """Return parameters that carry the token types of prompts; those of prompts without any are the same objects.

    Raises:
        SpecError: This engine reads none, or others than those of two texts.
    """
    typed = {index: types for index, prompt in enumerate(prompts) if any(types := types_of(prompt))}
    if not typed:
        return params
    _require_reader(llm, min(typed))
    return [_carrying(given, typed[i], i) if i in typed else given for i, given in enumerate(params)]


def types_of(prompt: Any) -> Sequence[int]:
    """Return the token types of a prompt, empty if it has none."""
    given = prompt.get("token_type_ids") if isinstance(prompt, Mapping) else None
    return () if given is None else given


def _require_reader(llm: Any, index: int) -> None:
    config = llm.model_config.hf_config
    names = getattr(config, "architectures", None) or ["this model"]
    if getattr(config, "type_vocab_size", 0) < 2 or not any(map(READERS.fullmatch, names)):
        raise SpecError(
            f"prompt {index} has token_type_ids, and {names[0]} reads none in vLLM: leave them out "
            "(return_token_type_ids=False).",
            sample=index,
        )


def _carrying(params: Any, types: Sequence[int], index: int) -> Any:
    first = list(types).index(1) if 1 in types else 0
    if list(types) != [0] * first + [1] * (len(types) - first):
        raise SpecError(
            f"prompt {index}: vLLM takes token_type_ids that are zeros, then ones (a text, then another).", sample=index
        )
    carrying = copy.copy(params)
    carrying.extra_kwargs = {**(params.extra_kwargs or {}), FIELD: first}
    return carrying
