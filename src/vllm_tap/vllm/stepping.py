"""Runs an offline engine step by step: requests in, outputs of those that have ended out. Client process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_tap.errors import EngineDiedError
from vllm_tap.vllm import frontend
from vllm_tap.vllm.refused import is_death
from vllm_tap.vllm.token_types import with_types


class Added(NamedTuple):
    """A prompt that has been added.

    Attributes:
        request_id: What its output will be called.
        inside: Names of the engine's requests, one for each completion.
        prompt_len: Tokens of the prompt.
    """

    request_id: str
    inside: list[str]
    prompt_len: int


@dataclass(frozen=True)
class Completion:
    """A completion in the form of vLLM's."""

    index: int
    token_ids: list[int]


class SoFar(NamedTuple):
    """A request that runs, in the form of vLLM's outputs."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[Completion]


def add(llm: Any, prompt: Any, params: Any, lora_request: Any, chat: Mapping[str, Any] | None) -> Added:
    """Add a prompt, or a conversation with what `LLM.chat` takes beside it, to an engine that generates."""
    (params,) = with_types(llm, [prompt], [params])
    before = set(frontend.unfinished(llm))
    frontend.enqueue(llm, [prompt], [params], chat, {"lora_request": lora_request, "use_tqdm": False})
    states = llm.llm_engine.output_processor.request_states
    inside = [name for name in states if name not in before]
    first = states[inside[0]]
    return Added(first.external_req_id, inside, len(first.prompt_token_ids or ()))


def step(llm: Any) -> list[Any]:
    """Wait for the engine's next outputs, and return those of requests that have ended.

    Raises:
        EngineDiedError: The engine core has ended.
    """
    try:
        with frontend.watched(llm):
            return [output for output in llm.llm_engine.step() if output.finished]
    except Exception as error:
        if not is_death(error):
            raise
        raise EngineDiedError("the engine died while it generated. See its log, and start a new LLM.") from error


def tokens_so_far(llm: Any, request_id: str) -> SoFar | None:
    """Return the tokens of a request that runs, by its name inside; None of one that has ended."""
    state = llm.llm_engine.output_processor.request_states.get(request_id)
    if state is None:
        return None
    generated = list(state.detokenizer.output_token_ids)
    return SoFar(state.external_req_id, state.prompt_token_ids, [Completion(state.request_index, generated)])


def abort(llm: Any, request_ids: list[str]) -> None:
    """Abort requests by their names inside."""
    waiting = set(frontend.unfinished(llm))
    mine = [request_id for request_id in request_ids if request_id in waiting]
    if mine:
        llm.llm_engine.abort_request(mine, internal=True)
