"""What the client asks of a `vllm.LLM`: parameters, and to generate or to embed. Client process."""

from __future__ import annotations

import sys
from typing import Any

from vllm_tap.errors import EngineDiedError, SpecError
from vllm_tap.spec import nearest


def pools(llm: Any) -> bool:
    """Tell whether an engine embeds rather than generates."""
    return getattr(llm.model_config, "runner_type", "generate") == "pooling"


def new_params(llm: Any, fields: dict[str, Any]) -> Any:
    """Return sampling or pooling parameters with these fields.

    Raises:
        SpecError: A field that they do not have.
    """
    # The caller holds an LLM, so vLLM is loaded; this package does not import it outside the engine.
    vllm = sys.modules["vllm"]
    kind = vllm.PoolingParams if pools(llm) else vllm.SamplingParams
    known = [name for name in kind.__annotations__ if not name.startswith("_")]
    for name in fields:
        if name not in known:
            raise SpecError(f"{kind.__name__} has no field {name!r}.{nearest(name, known)}")
    return kind(**fields)


def generate(llm: Any, prompts: list[Any], params: list[Any], use_tqdm: Any) -> list[Any]:
    """Run prompts through an engine and return its outputs in the order of the prompts.

    Raises:
        EngineDiedError: The engine died on the way.
    """
    try:
        if pools(llm):
            return list(llm.encode(prompts, pooling_params=params, use_tqdm=use_tqdm, pooling_task="embed"))
        return list(llm.generate(prompts, params, use_tqdm=use_tqdm))
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":
            raise EngineDiedError("the engine died while it generated. See its log, and start a new LLM.") from error
        raise
