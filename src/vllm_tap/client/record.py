"""`record`: prompts of any number through an engine, rows into a dataset. Client process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_tap.client.bounds import Spill
from vllm_tap.client.capture import captured
from vllm_tap.client.identity import full_model_facts, versions
from vllm_tap.client.prompts import unpacked
from vllm_tap.client.recording import Recording
from vllm_tap.client.writers import Writers
from vllm_tap.errors import SpecError
from vllm_tap.spec import Spec
from vllm_tap.store.dataset import Dataset
from vllm_tap.store.recording import Run, record_with
from vllm_tap.vllm import frontend


def record(
    llm: Any,
    prompts: Iterable[Any],
    spec: Spec,
    path: Any,
    *,
    resume: bool = False,
    batch: int = 256,
    metadata: Iterable[Mapping[str, Any] | None] | None = None,
    share: tuple[int, int] = (0, 1),
    on_part: Any = None,
    writers: str = "auto",
    transport: str = "auto",
    budget_bytes: int | None = None,
    staging: str = "auto",
    on_full: str | Spill = "fail",
    progress: bool | None = None,
    lora_request: Any = None,
    sampling_params: Any = None,
    **sampling: Any,
) -> Dataset:
    """Generate from prompts of any number and write the rows that went through the model into a dataset.

    `batch` prompts are captured at a time and become a part of the dataset, which is there whole or not at all; a part
    is written while the next one is captured. After a kill at any moment, the same call with `resume=True` goes on
    behind what is sealed.

    Args:
        llm: A `vllm.LLM`, started without any special argument.
        prompts: Any iterable of prompts or conversations, each as `capture` takes it. To resume, pass the same ones in
            the same order.
        spec: What to capture.
        path: A folder, or a URL that fsspec knows.
        resume: Whether to go on with a dataset that is there. Without one, a new one begins in either case.
        batch: Prompts that are captured together. Their rows must fit `budget_bytes`, if possible twice.
        metadata: A mapping that JSON can hold, or None, for each prompt; it becomes `Sample.metadata`.
        share: (index, count) where `count` processes record into one folder: this one takes every `count`-th piece of
            `batch` prompts, from piece `index` on.
        on_part: Called with the `Manifest` of each part that has been sealed.
        writers: "client": this process maps the rows and writes them. "workers": each writes those of its own layers,
            and they never pass through this process; not with `reduce` and `dtype` of the Spec, nor with a URL. "auto":
            the workers, where rows would cross a network otherwise and they may write into this folder.
        transport: As `capture` takes it; so are the rest.
        budget_bytes: Most memory for rows.
        staging: On GPU engines, how rows leave the device.
        progress: Show a progress bar for each piece.
        lora_request: One for all prompts.
        on_full: As for `capture`.
        sampling_params: One for all prompts.
        **sampling: Fields of `SamplingParams`, instead of `sampling_params`.

    Returns:
        Dataset: what is sealed in the folder now, also of earlier calls.

    Raises:
        DatasetError: The folder holds a dataset and `resume` is not set, or one of another model, `Spec`, sampling or
            other prompts; or it cannot be written to. What is sealed stays readable.
        SpecError: No prompts, or arguments that cannot be.
        TapError: As for `capture`.

    Source:
        As for `capture`.

    Cost:
        One pass over the rows to write them and one for their checksums, while the engine computes the next piece.
    """
    frontend.require_llm(llm)
    run = run_of(llm, spec, sampling_params, lora_request, sampling)
    who = Writers(llm, path, spec, transport, writers)

    def capture(piece: list[Any]) -> Any:
        # Before a capture begins, whose first call is not awaited: another call would take its place.
        prepare = Recording.leave_rows if who.are_workers else None
        result = captured(
            llm,
            piece,
            spec,
            prepare,
            transport=transport,
            budget_bytes=budget_bytes,
            staging=staging,
            on_full=on_full,
            progress=progress,
            lora_request=lora_request,
            sampling_params=sampling_params,
            **sampling,
        )
        if any(output is None for output in result.outputs):
            raise KeyboardInterrupt  # which ended the capture early: a part holds all of its samples
        if who.are_workers:
            who.leave(result)
        return result

    return record_with(
        capture,
        unpacked(prompts),
        path,
        run,
        resume=resume,
        batch=batch,
        metadata=metadata,
        share=share,
        on_part=on_part,
    )


def run_of(llm: Any, spec: Any, sampling_params: Any, lora_request: Any, fields: Mapping[str, Any]) -> Run:
    """Return what is the same for all parts of a dataset.

    Raises:
        SpecError: An argument is a list, as that of a capture may be.
    """
    if not isinstance(spec, Spec):
        raise SpecError(f"record takes one vllm_tap.Spec for all prompts, got a {type(spec).__name__}.")
    for name, given in (("sampling_params", sampling_params), ("lora_request", lora_request)):
        if isinstance(given, Sequence):
            raise SpecError(f"record takes one {name} for all prompts, got a {type(given).__name__}.")
    return Run(spec, full_model_facts(llm), _sampling_text(sampling_params, lora_request, fields), versions())


def _sampling_text(sampling_params: Any, lora_request: Any, fields: Mapping[str, Any]) -> str:
    """Return how tokens are chosen, the same text for the same arguments."""
    named = {"sampling_params": sampling_params, "lora_request": lora_request, **dict(sorted(fields.items()))}
    return ", ".join(f"{name}={value!r}" for name, value in named.items() if value is not None)
