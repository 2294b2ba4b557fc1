"""`capture`: one call from prompts to labelled tensors. Client process."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

from vllm_tap.client import missing
from vllm_tap.client.bounds import Spill
from vllm_tap.client.connection import connect
from vllm_tap.client.expected_rows import ExpectedRows
from vllm_tap.client.interruption import current
from vllm_tap.client.progress import REFRESH_SECONDS, Bar, is_shown
from vllm_tap.client.prompts import CHAT_OPTIONS, read_prompts
from vllm_tap.client.recording import Recording
from vllm_tap.client.result import Capture
from vllm_tap.client.wishes import Wishes
from vllm_tap.errors import SpecError
from vllm_tap.spec import Spec
from vllm_tap.vllm import frontend
from vllm_tap.vllm.token_types import with_types

MOST_AVERAGED: Final = 16
"""Choices of positions by which the rows of all requests are guessed."""


def capture(
    llm: Any,
    prompts: Any,
    spec: Spec | Sequence[Spec],
    *,
    transport: str = "auto",
    budget_bytes: int | None = None,
    staging: str = "auto",
    on_full: str | Spill = "fail",
    progress: bool | None = None,
    lora_request: Any = None,
    sampling_params: Any = None,
    **sampling: Any,
) -> Capture:
    """Generate from prompts and return the rows that went through the model, labelled.

    The result lives as long as you keep it, also after the engine is gone.

    Args:
        llm: A `vllm.LLM`, started without any special argument.
        prompts: A prompt or an iterable of them: strings, lists or arrays of token ids, dicts as `LLM.generate` takes
            them, encodings of a tokenizer (padding that the attention mask leaves out falls away; a cross-encoder gets
            their token types), or conversations as `LLM.chat` takes them, which go through the engine's chat template
            and get its generation prompt unless `add_generation_prompt=False`.
        spec: What to capture; or a list with a Spec for each prompt. Then a sample has what its own Spec asks for.
            Workers write the layers of all Specs for each request, of the positions that its Spec asks for, and the
            rest is dropped here: capture prompts whose layers have nothing in common in calls of their own.
        transport: "segment" (shared memory), "tcp" or "nixl" (a network, see docs/hosts.md), "inline"
            (bytes through calls: slow, works everywhere), or "auto".
        budget_bytes: Most memory for rows over all workers; by default a quarter of RAM, at most 8 GiB.
        staging: On GPU engines, "staged", "direct" or "auto"; see `Recording`.
        on_full: "fail": rows beyond the budget are a `BudgetError`; "spill" or a `Spill`: they go to files of the
            workers' host, which are gone with the result. Its tensors are read from there.
        progress: Show a progress bar; by default when standard error is a terminal.
        lora_request: A `vllm.lora.request.LoRARequest`, or one (or None) per prompt.
        sampling_params: A `vllm.SamplingParams`, or one per prompt; on an engine that pools, a `vllm.PoolingParams`,
            whose `task` chooses among the tasks of the model. Without, the engine samples as `llm.generate(prompts)`
            does: by the model's generation_config.json.
        **sampling: Fields of `SamplingParams`, over those of the model's generation_config.json; with conversations
            also what `LLM.chat` takes: `chat_template`, `chat_template_kwargs`, `add_generation_prompt`,
            `continue_final_message`, `tools`, `chat_template_content_format`, `mm_processor_kwargs`.

    Returns:
        Capture: one sample per prompt; rows of a sample are its prompt tokens and generated tokens minus one. Its
        `outputs` are those of `LLM.generate`, or of `LLM.encode` with the pooling task.

    Raises:
        SpecError: No prompts, no `Spec` or a list of another length, an unknown layer or argument, or requests of yours
            wait in the engine; or vLLM refuses a prompt, such as one that is too long: `sample` is its number.
        EngineUnsupportedError: The plugin is not loaded, or the model cannot be tapped.
        BudgetError: The rows do not fit the budget.
        RowsMissingError: A row did not arrive, or came for other tokens than the final ones.
        PositionError: A prompt lacks a position that was asked for, or a completion generated rows; see `Spec.missing`.
        EngineDiedError: The engine ended.

    Source:
        Each stream's tensor in the compiled model; see `Capture.conventions`.

    Cost:
        One write per row in the worker; none here until rows are read (see `LayerMap`).
    """
    return captured(
        llm,
        prompts,
        spec,
        None,
        transport=transport,
        budget_bytes=budget_bytes,
        staging=staging,
        on_full=on_full,
        progress=progress,
        lora_request=lora_request,
        sampling_params=sampling_params,
        **sampling,
    )


def captured(
    llm: Any,
    prompts: Any,
    spec: Spec | Sequence[Spec],
    prepare: Callable[[Recording], None] | None,
    *,
    progress: bool | None,
    lora_request: Any,
    sampling_params: Any,
    transport: str,
    budget_bytes: int | None,
    staging: str,
    on_full: str | Spill,
    **sampling: Any,
) -> Capture:
    """Do what `capture` does, with a recording that is prepared before any request is sent."""
    begin = time.perf_counter()
    frontend.require_llm(llm)
    _require_no_others(llm)
    read = read_prompts(prompts)
    chat = take_chat_options(sampling)
    if chat and not read.are_chats:
        raise SpecError(f"{', '.join(chat)}: for conversations alone, and these prompts are none.")
    if read.are_chats:
        frontend.require_chat(llm)
    prompts = read.items
    params = with_types(llm, prompts, _params(llm, len(prompts), sampling_params, sampling))
    wishes = Wishes(spec)
    wishes.require(len(prompts))
    recording = Recording(
        llm,
        spec,
        transport=transport,
        budget_bytes=budget_bytes,
        staging=staging,
        on_full=on_full,
        expected_rows=_expected_rows(prompts, params),
        wait=False,
    )
    try:
        if prepare is not None:
            prepare(recording)
        for wish in wishes:
            missing.check_prompts(wish, prompts, wishes.has(wish))
        marked = recording.mark_all(params, owned=sampling_params is None)
        started = time.perf_counter()
        with _shown(llm, recording, params, progress) as bar:
            generate = functools.partial(
                frontend.generate,
                llm,
                prompts,
                marked,
                bar,
                lora_request,
                chat=chat if read.are_chats else None,
                queued=recording.started,
                tokens=recording.tokens.read,
                computed=recording.end,
            )
            outputs = _finished(llm, len(prompts), generate)
        generated = time.perf_counter()
        result = recording.finish(outputs)
    except BaseException:
        recording.stop()
        raise
    result.seconds.update(start=started - begin, generate=generated - started)
    return result


def take_chat_options(fields: dict[str, Any]) -> dict[str, Any]:
    """Take what `LLM.chat` takes out of fields of sampling parameters, and return it."""
    return {name: fields.pop(name) for name in CHAT_OPTIONS if name in fields}


@contextmanager
def _shown(llm: Any, recording: Recording, params: list[Any], progress: bool | None) -> Iterator[Any]:
    """Show a bar during the block, if it is to be; yield what vLLM takes as `use_tqdm`."""
    if not is_shown(progress):
        yield False
        return
    num_requests = sum(getattr(given, "n", 1) or 1 for given in params)
    some = dict(itertools.islice(recording.wishes.shipped.items(), MOST_AVERAGED))
    bar = Bar(recording.progress, ExpectedRows(llm, some, num_requests))
    try:
        with frontend.ticking(llm, REFRESH_SECONDS, bar.tick):
            yield bar.make
    finally:
        bar.close()


def _finished(llm: Any, num_prompts: int, generate: Callable[..., list[Any]]) -> Sequence[Any]:
    """Return the outputs; if an `Interruption` ends the wait, of the prompts that are finished, None for the others."""
    interruption = current()
    if interruption is None:
        return generate()
    finished: dict[int, Any] = {}
    try:
        with frontend.interruptible(llm, interruption, finished) as read_arrived:
            return generate(interrupted=read_arrived)
    except KeyboardInterrupt:
        if not finished:
            raise
        return [finished.get(number) for number in range(num_prompts)]
    finally:
        interruption.hold()


def _require_no_others(llm: Any) -> None:
    if frontend.unfinished(llm):
        connect(llm).status()  # says so if the engine is gone: its requests stay for ever
    frontend.require_no_others(llm, "capture beside them with vllm_tap.Recording")


def _params(llm: Any, num_prompts: int, given: Any, fields: dict[str, Any]) -> list[Any]:
    """Return sampling (or pooling) parameters per prompt."""
    if given is not None and fields:
        raise SpecError(f"pass sampling_params or its fields ({', '.join(fields)}), not both.")
    if given is None:
        given = frontend.new_params(llm, fields, frontend.default_fields(llm))
    each = list(given) if isinstance(given, Sequence) else [given] * num_prompts
    if len(each) != num_prompts:
        raise SpecError(f"{len(each)} sampling_params for {num_prompts} prompts.")
    for params in {id(params): params for params in each}.values():
        frontend.require_params(llm, params)
    return each


def _expected_rows(prompts: list[Any], params: list[Any]) -> int:
    """Guess how many rows will come: exact for token ids that generate to the end, four characters a token for text."""
    rows = 0
    for prompt, given in zip(prompts, params, strict=True):
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        num_prompt = len(_text(prompt)) // 4 if ids is None else len(ids)
        rows += (getattr(given, "n", 1) or 1) * (num_prompt + (getattr(given, "max_tokens", 0) or 0))
    return rows


def _text(prompt: Any) -> str:
    if isinstance(prompt, Mapping):
        return str(prompt.get("prompt") or "")
    return prompt if isinstance(prompt, str) else "".join(str(message.get("content", "")) for message in prompt)
