"""vLLM's `AsyncLLM` as this package uses it: calls, parameters, prompts. In the process that holds it."""

from __future__ import annotations

import copy
import sys
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from vllm_tap.errors import EngineDiedError, SpecError
from vllm_tap.spec import nearest

MOST_SPECIAL: Final = 16
"""Special tokens that a tokenizer may put around a text."""


@dataclass(frozen=True)
class Completion:
    """A completion in the form of vLLM's, with the tokens that it has so far."""

    index: int
    token_ids: list[int]


class Tokens:
    """Tokens of a request that runs, put together from outputs of any kind; in the form of vLLM's outputs.

    Attributes:
        request_id: As the outputs have it.
        prompt_token_ids: Empty before the first output.
        outputs: One `Completion` for each that has begun.
        finished: Whether the request has ended.
    """

    def __init__(self, is_delta: bool) -> None:
        self._is_delta = is_delta
        self.request_id = ""
        self.prompt_token_ids: list[int] = []
        self.finished = False
        self._completions: dict[int, Completion] = {}

    def add(self, output: Any) -> None:
        """Take an output of the request."""
        self.request_id, self.finished = output.request_id, output.finished
        self.prompt_token_ids = self.prompt_token_ids or list(output.prompt_token_ids or ())
        for one in output.outputs:
            completion = self._completions.setdefault(one.index, Completion(one.index, []))
            if not self._is_delta:
                completion.token_ids.clear()
            completion.token_ids.extend(one.token_ids)

    def copy(self) -> Tokens:
        """Return the tokens that are known now, for another thread."""
        copied = Tokens(self._is_delta)
        copied.request_id, copied.finished = self.request_id, self.finished
        copied.prompt_token_ids = self.prompt_token_ids
        copied._completions = {
            index: Completion(index, list(one.token_ids)) for index, one in self._completions.items()
        }
        return copied

    @property
    def outputs(self) -> list[Completion]:
        """The completions, ascending."""
        return [self._completions[index] for index in sorted(self._completions)]


def require_async(llm: Any) -> None:
    """Refuse what is no `AsyncLLM`, and one that pools.

    Raises:
        SpecError: It is something else.
    """
    if not all(hasattr(llm, name) for name in ("generate", "collective_rpc", "vllm_config", "engine_core")):
        raise SpecError(f"expected a vLLM AsyncLLM, got {type(llm).__name__}: for a vllm.LLM use vllm_tap.Tap.")
    if getattr(llm.vllm_config.model_config, "runner_type", "generate") == "pooling":
        raise SpecError("this AsyncLLM pools: capture with vllm.LLM and vllm_tap.capture.")


def num_engines(llm: Any) -> int:
    """Return how many engines take its requests: several where they are data parallel."""
    return len(getattr(llm.engine_core, "core_engines", ())) or 1


def route(llm: Any, engine: int) -> dict[str, int]:
    """Return the arguments of `generate` that send a request to one of the engines.

    vLLM calls it a rank, and counts the engines of this `AsyncLLM` alone, from 0.
    """
    return {"data_parallel_rank": engine} if num_engines(llm) > 1 else {}


async def call(llm: Any, method: str, engine: int) -> list[Any]:
    """Call a method of all workers of one of the engines, and return what they return.

    Raises:
        EngineDiedError: The engine core has ended.
    """
    with _death_told():
        if num_engines(llm) < 2:
            return list(await llm.collective_rpc(method))
        # collective_rpc calls all engines and returns what the first one says.
        core, arguments = llm.engine_core, ("collective_rpc", method, None, (), None)
        return list(await core._call_utility_async(*arguments, engine=core.core_engines[engine]))


def is_delta(params: Any) -> bool:
    """Tell whether outputs of a request have its new tokens alone."""
    return getattr(params.output_kind, "name", "") == "DELTA"


def new_params(llm: Any, given: Any, fields: Mapping[str, Any], kind: str) -> Any:
    """Return sampling parameters of one's own: a copy of the given ones, or new ones.

    Args:
        llm: An `AsyncLLM`.
        given: `SamplingParams`, or None.
        fields: Their fields by name, over those of the model's generation_config.json, where none are given.
        kind: Of outputs: "DELTA" or "FINAL_ONLY".

    Raises:
        SpecError: Something else, or a field that they do not have.
    """
    vllm = sys.modules["vllm"]
    if given is not None:
        if fields:
            raise SpecError(f"pass sampling_params or its fields ({', '.join(fields)}), not both.")
        if not isinstance(given, vllm.SamplingParams):
            raise SpecError(f"sampling_params are vllm.SamplingParams, got {type(given).__name__}.")
        params = copy.deepcopy(given)
    else:
        known = [name for name in vllm.SamplingParams.__annotations__ if not name.startswith("_")]
        for name in fields:
            if name not in known:
                raise SpecError(f"SamplingParams has no field {name!r}.{nearest(name, known)}")
        defaults = llm.vllm_config.model_config.get_diff_sampling_param()
        params = vllm.SamplingParams(**copy.deepcopy({**defaults, **fields}))
    params.output_kind = getattr(sys.modules["vllm.sampling_params"].RequestOutputKind, kind)
    return params


def most_rows(llm: Any, prompt: Any, params: Any) -> int:
    """Return how many rows a request may make at most: a text has no more tokens than bytes, but for special ones."""
    longest = int(llm.vllm_config.model_config.max_model_len)
    text = prompt if isinstance(prompt, str) else prompt.get("prompt")
    ids = None if isinstance(prompt, str) else prompt.get("prompt_token_ids")
    prompt_len = (
        len(ids) if ids is not None else len(text.encode()) + MOST_SPECIAL if isinstance(text, str) else longest
    )
    return (params.n or 1) * min(prompt_len + (params.max_tokens or longest), longest)


async def generate(
    llm: Any, prompt: Any, params: Any, request_id: str, engine: int, **options: Any
) -> AsyncGenerator[Any, None]:
    """Yield the outputs of a prompt, which one of the engines runs. A reader that leaves aborts the request.

    Raises:
        EngineDiedError: The engine core has ended.
    """
    with _death_told():
        async for output in llm.generate(prompt, params, request_id, **route(llm, engine), **options):
            yield output


class _death_told:  # noqa: N801 (a context manager, also around awaits)
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if kind is not None and kind.__name__ == "EngineDeadError":
            raise EngineDiedError("the engine died. See its log, and start a new one.") from error
