"""`capture`: one call from prompts to labelled tensors. Client process."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_tap.client.connection import connect
from vllm_tap.client.progress import bar
from vllm_tap.client.recording import Recording
from vllm_tap.client.result import Capture
from vllm_tap.errors import SpecError
from vllm_tap.spec import Spec
from vllm_tap.vllm import frontend


def capture(
    llm: Any,
    prompts: Any,
    spec: Spec,
    *,
    transport: str = "auto",
    budget_bytes: int | None = None,
    staging: str = "auto",
    progress: bool | None = None,
    lora_request: Any = None,
    sampling_params: Any = None,
    **sampling: Any,
) -> Capture:
    """Generate from prompts and return the rows that went through the model, labelled.

    The result lives as long as you keep it, also after the engine is gone.

    Args:
        llm: A `vllm.LLM`, started without any special argument.
        prompts: A prompt or a list of them, as `LLM.generate` takes them: strings, lists of token ids, or dicts with
            `prompt` or `prompt_token_ids`.
        spec: What to capture.
        transport: "segment" (shared memory), "inline" (bytes through calls: slow, works everywhere), or "auto".
        budget_bytes: Most memory for rows over all workers; by default a quarter of RAM, at most 8 GiB.
        staging: On GPU engines, "staged", "direct" or "auto"; see `Recording`.
        progress: Show a progress bar; by default when standard error is a terminal.
        lora_request: A `vllm.lora.request.LoRARequest`, or one (or None) per prompt.
        sampling_params: A `vllm.SamplingParams`, or one per prompt.
        **sampling: Fields of `SamplingParams`, instead of `sampling_params`.

    Returns:
        Capture: one sample per prompt; rows of a sample are its prompt tokens and generated tokens minus one.

    Raises:
        SpecError: No prompts, no `Spec`, an unknown layer or argument, or requests of yours wait in the engine.
        EngineUnsupportedError: The plugin is not loaded, or the model cannot be tapped.
        BudgetError: The rows do not fit the budget.
        RowsMissingError: A row did not arrive, or came for other tokens than the final ones.
        EngineDiedError: The engine ended.

    Source:
        Each stream's tensor in the compiled model; see `Capture.conventions`.

    Cost:
        One write per row in the worker; none here until rows are read (see `LayerMap`).
    """
    begin = time.perf_counter()
    frontend.require_llm(llm)
    _require_no_others(llm)
    prompts = _checked_prompts(prompts)
    params = _params(llm, len(prompts), sampling_params, sampling)
    recording = Recording(
        llm,
        spec,
        transport=transport,
        budget_bytes=budget_bytes,
        staging=staging,
        expected_rows=_expected_rows(prompts, params),
        wait=False,
    )
    try:
        marked = recording.mark_all(params, owned=sampling_params is None)
        started = time.perf_counter()
        show = bar(progress, recording.counts)
        outputs = frontend.generate(
            llm,
            prompts,
            marked,
            show,
            lora_request,
            queued=recording.started,
            tokens=recording.tokens.read,
            computed=recording.end,
        )
        generated = time.perf_counter()
        result = recording.finish(outputs)
    except BaseException:
        recording.stop()
        raise
    result.seconds.update(start=started - begin, generate=generated - started)
    return result


def _require_no_others(llm: Any) -> None:
    if frontend.unfinished(llm):
        connect(llm).status()  # says so if the engine is gone: its requests stay for ever
    frontend.require_no_others(llm, "capture beside them with vllm_tap.Recording")


def _checked_prompts(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | Mapping) or _is_token_ids(prompts):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise SpecError(f"prompts is a list of strings or dicts, got {type(prompts).__name__}.")
    if not prompts:
        raise SpecError("prompts is empty: there is nothing to capture.")
    checked = [{"prompt_token_ids": prompt} if _is_token_ids(prompt) else prompt for prompt in prompts]
    for index, prompt in enumerate(checked):
        if not isinstance(prompt, str | Mapping):
            raise SpecError(
                f"prompt {index} is a {type(prompt).__name__}: pass strings, or dicts such as "
                '{"prompt_token_ids": [...]}.'
            )
        if not isinstance(prompt, str) and prompt.get("prompt_embeds") is not None:
            raise SpecError(f"prompt {index} has prompt_embeds: rows are labelled by token ids. Pass prompt_token_ids.")
    return checked


def _is_token_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(type(token) is int for token in prompt)


def _params(llm: Any, num_prompts: int, given: Any, fields: dict[str, Any]) -> list[Any]:
    """Return sampling (or pooling) parameters per prompt."""
    if given is not None and fields:
        raise SpecError(f"pass sampling_params or its fields ({', '.join(fields)}), not both.")
    if given is None:
        given = frontend.new_params(llm, fields)
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
        ids = None if isinstance(prompt, str) else prompt.get("prompt_token_ids")
        text = prompt if isinstance(prompt, str) else prompt.get("prompt") or ""
        num_prompt = len(text) // 4 if ids is None else len(ids)
        rows += (getattr(given, "n", 1) or 1) * (num_prompt + (getattr(given, "max_tokens", 0) or 0))
    return rows
