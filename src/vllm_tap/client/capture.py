"""`capture`: one call from prompts to labelled tensors. Client process."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_tap.client import engine
from vllm_tap.client.connection import Connection, connect, new_capture_id
from vllm_tap.client.memory import RankMemory
from vllm_tap.client.progress import bar
from vllm_tap.client.rank_rows import RankRows
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import CaptureError, EngineUnsupportedError, SpecError
from vllm_tap.frame import messages
from vllm_tap.labels import mark
from vllm_tap.spec import SINGLE_STREAMS, Layers, Spec, nearest, resolve_layers

MAX_DEFAULT_BUDGET_BYTES = 8 << 30

STAGINGS = ("auto", "staged", "direct")

SHIPPED = {"routed_experts": ("expert_ids", "expert_weights")}
"""Fields of a Spec that stand for more than one stream of the workers."""


def capture(
    llm: Any,
    prompts: Any,
    spec: Spec,
    *,
    transport: str = "auto",
    budget_bytes: int | None = None,
    staging: str = "auto",
    progress: bool | None = None,
    sampling_params: Any = None,
    **sampling: Any,
) -> Capture:
    """Generate from prompts and return the rows that went through the model, labelled.

    The result lives as long as you keep it, also after the engine is gone.

    Args:
        llm: A `vllm.LLM`, started without any special argument.
        prompts: A prompt or a list of them, as `LLM.generate` takes them: strings, or dicts with `prompt` or
            `prompt_token_ids`.
        spec: What to capture.
        transport: "segment" (shared memory), "inline" (bytes through calls: slow, works everywhere), or "auto".
        budget_bytes: Most memory for rows over all workers; by default a quarter of RAM, at most 8 GiB.
        staging: On GPU engines, "staged" (rows pass through a few hundred MiB of device memory), "direct" (kernels
            write to pinned host memory: no device memory, slower for many rows), or "auto".
        progress: Show a progress bar; by default when standard error is a terminal.
        sampling_params: A `vllm.SamplingParams`, or one per prompt.
        **sampling: Fields of `SamplingParams`, instead of `sampling_params`.

    Returns:
        Capture: one sample per prompt; rows of a sample are its prompt tokens and generated tokens minus one.

    Raises:
        SpecError: No prompts, no `Spec`, an unknown layer or argument.
        EngineUnsupportedError: The plugin is not loaded, or the model cannot be tapped.
        BudgetError: The rows do not fit the budget.
        RowsMissingError: A row did not arrive, or came for other tokens than the final ones.
        EngineDiedError: The engine ended.

    Source:
        Each stream's tensor in the compiled model; see `Capture.conventions`.

    Cost:
        One write per row in the worker; none here until rows are read (see `LayerMap`).
    """
    prompts = _checked_prompts(prompts)
    if not isinstance(spec, Spec):
        raise SpecError(f'spec is a vllm_tap.Spec, got {type(spec).__name__}: for example Spec(hidden_states="all").')
    clock = Clock()
    connection = connect(llm)
    params = _params(llm, len(prompts), sampling_params, sampling)
    start = _start(connection, spec, transport, budget_bytes, staging, _expected_rows(prompts, params))
    connection.call(messages.Started, "start", messages.encode(start))
    clock.lap("start")
    try:
        marked = [_marked(given, start.capture_id, sample) for sample, given in enumerate(params)]
        outputs = engine.generate(llm, prompts, marked, bar(progress, lambda: _counts(llm)))
        clock.lap("generate")
        handed_over = connection.finish(start.capture_id, start.shared)
    except BaseException:
        _stop(connection, start.capture_id)
        raise
    clock.lap("finish")
    result = _result(connection, spec, start, outputs, handed_over)
    clock.lap("check")
    result.seconds.update(clock.seconds, wait=max(descriptor.wait_seconds for descriptor, _ in handed_over))
    return result


class Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Book the time since the last lap under a name."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def _checked_prompts(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | Mapping):
        prompts = [prompts]
    if not isinstance(prompts, Sequence):
        raise SpecError(f"prompts is a list of strings or dicts, got {type(prompts).__name__}.")
    if not prompts:
        raise SpecError("prompts is empty: there is nothing to capture.")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str | Mapping):
            raise SpecError(
                f"prompt {index} is a {type(prompt).__name__}: pass strings, or dicts such as "
                '{"prompt_token_ids": [...]}.'
            )
    return list(prompts)


def _params(llm: Any, num_prompts: int, given: Any, fields: dict[str, Any]) -> list[Any]:
    """Return sampling (or pooling) parameters per prompt."""
    if given is not None and fields:
        raise SpecError(f"pass sampling_params or its fields ({', '.join(fields)}), not both.")
    if given is None:
        given = engine.new_params(llm, fields)
    if isinstance(given, Sequence):
        if len(given) != num_prompts:
            raise SpecError(f"{len(given)} sampling_params for {num_prompts} prompts.")
        return list(given)
    return [given] * num_prompts


def _marked(params: Any, capture_id: str, sample: int) -> Any:
    """Return a copy of the parameters that makes the engine capture the request.

    Rows that the prefix cache holds never go through the model, so captured requests do not read it; others still do.
    """
    marked = copy.copy(params)
    field = "extra_args" if hasattr(params, "extra_args") else "extra_kwargs"
    setattr(marked, field, {**(getattr(params, field) or {}), **mark(capture_id, sample, getattr(params, "n", 1) or 1)})
    marked.skip_reading_prefix_cache = True
    return marked


def _expected_rows(prompts: list[Any], params: list[Any]) -> int:
    """Guess how many rows will come: exact for token ids that generate to the end, four characters a token for text."""
    rows = 0
    for prompt, given in zip(prompts, params, strict=True):
        ids = None if isinstance(prompt, str) else prompt.get("prompt_token_ids")
        text = prompt if isinstance(prompt, str) else prompt.get("prompt") or ""
        completions = getattr(given, "n", 1) or 1
        rows += completions * (
            (len(ids) if ids is not None else len(text) // 4) + (getattr(given, "max_tokens", 0) or 0)
        )
    return rows


def _start(
    connection: Connection, spec: Spec, transport: str, budget_bytes: int | None, staging: str, expected_rows: int
) -> messages.Start:
    if staging not in STAGINGS:
        raise SpecError(f"staging={staging!r} is not known.{nearest(staging, STAGINGS)}")
    if budget_bytes is None:
        budget_bytes = default_budget_bytes()
    if budget_bytes <= 0:
        raise SpecError(f"budget_bytes is a positive number, got {budget_bytes}.")
    shared = connection.choose_transport(transport)
    return messages.Start(
        capture_id=new_capture_id(),
        streams=_resolve(connection, spec),
        positions=spec.positions,
        residual=connection.residual,
        shared=shared,
        clients={rank: reader.client for rank, reader in connection.readers().items()} if shared else {},
        budget_bytes=budget_bytes // len(connection.hellos),
        staging=staging,
        expected_rows=expected_rows if spec.positions == "all" else 0,
    )


def _resolve(connection: Connection, spec: Spec) -> dict[str, tuple[int, ...]]:
    """Return the layers of each of the workers' streams that the specification asks for."""
    streams: dict[str, tuple[int, ...]] = {}
    for field in spec.streams:
        for stream in SHIPPED.get(field, (field,)):
            available = connection.available(stream)
            reason = connection.why_not(stream)
            if reason:
                raise EngineUnsupportedError(f"{stream} cannot be captured from this model: {reason}")
            if field in SINGLE_STREAMS and not available:
                raise EngineUnsupportedError(f"{stream} cannot be captured from this model: it was not found in it")
            layers: Layers = "all" if field in SINGLE_STREAMS else getattr(spec, field)
            streams[stream] = tuple(resolve_layers(stream, layers, available, connection.num_layers))
    return streams


def default_budget_bytes() -> int:
    """Return a quarter of this machine's RAM, at most 8 GiB."""
    return min(MAX_DEFAULT_BUDGET_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)


def _counts(llm: Any) -> tuple[int, int]:
    states = llm.collective_rpc("vllm_tap_status")
    return max(state["num_rows"] for state in states), sum(state["num_bytes"] for state in states)


def _stop(connection: Connection, capture_id: str) -> None:
    """Abandon a capture in the workers; if that fails too, the first error is the one to report."""
    try:
        connection.call(messages.Stopped, "stop", capture_id)
    except (CaptureError, EngineUnsupportedError) as error:
        current = sys.exception()
        if current is not None and current is not error:
            current.add_note(f"(and the capture could not be stopped: {error})")


def _result(
    connection: Connection,
    spec: Spec,
    start: messages.Start,
    outputs: list[Any],
    handed_over: list[tuple[messages.Descriptor, RankMemory]],
) -> Capture:
    sequences = Sequences(outputs, spec.positions)
    ranks = [RankRows(descriptor, memory, sequences) for descriptor, memory in handed_over]
    conventions = {info.name: info.convention for hello in connection.hellos for info in hello.streams}
    conventions["hidden_states"] = connection.residual
    return Capture(
        spec,
        outputs,
        sequences,
        ranks,
        {name: conventions[name] for name in start.streams},
        connection.num_layers,
    )
