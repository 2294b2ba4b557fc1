"""Ray Data: prompts of a dataset of Ray's through its vLLM processor, rows into one dataset of ours. Driver process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from vllm_tap.client.recording import STAGINGS
from vllm_tap.errors import DatasetError, SpecError
from vllm_tap.spec import Spec, nearest
from vllm_tap.store import index
from vllm_tap.store.part import sealed_parts
from vllm_tap.store.places import place_of

STAGE: Final = "vLLMEngineStage"
"""Ray's name for the stage that holds the engine."""

P = TypeVar("P")


class Numbers:
    """Numbers for samples of all actors. Runs in an actor of its own."""

    def __init__(self, first: int) -> None:
        self._next = first

    def take(self, count: int) -> int:
        """Return the first of so many numbers that nobody else gets."""
        first = self._next
        self._next += count
        return first


def recorded(
    processor: P,
    spec: Spec,
    path: Any,
    *,
    column: str = "sample",
    metadata: Sequence[str] = (),
    append: bool = False,
    budget_bytes: int | None = None,
    staging: str = "auto",
) -> P:
    """Have a processor of Ray Data's record the rows of its requests.

    Each actor captures its batches from its own engine and writes them beside the others'. A batch is a part of the
    dataset, sealed before Ray gets the batch. Rows do not pass through Ray.

    Args:
        processor: What `ray.data.llm.build_processor` returns for a `vLLMEngineProcessorConfig`. It is changed.
        spec: What to capture.
        path: Folder of the dataset, which all of Ray's hosts reach, or a URL that fsspec knows.
        column: Name of the column with the number of a row's sample, which `postprocess` sees and may pass on.
        metadata: Columns of the engine's input that JSON can hold, kept as the sample's `metadata`; such as the key
            of a row.
        append: Whether to add to a dataset that is there, of the same model and `Spec`.
        budget_bytes: Most memory for the rows of a batch.
        staging: As for `Recording`.

    Returns:
        The processor.

    Raises:
        SpecError: Something else, or a processor that does not generate.
        DatasetError: The folder holds a dataset and `append` is not set, or one of another `Spec`.

    Source:
        As for `capture`.

    Cost:
        As for `record`, in each actor. A reply waits for its batch.
    """
    import ray

    from vllm_tap.interchange.ray_stage import Options, RecordingStage

    stage = _stage_of(processor)
    if not isinstance(spec, Spec):
        raise SpecError(f"recorded takes one vllm_tap.Spec for all rows, got a {type(spec).__name__}.")
    if staging not in STAGINGS:
        raise SpecError(f"staging={staging!r} is not known.{nearest(staging, STAGINGS)}")
    index.require_pyarrow()
    where = os.fspath(path)
    where = where if "://" in where else os.path.abspath(where)
    place = place_of(where)
    sealed = sealed_parts(place)
    if sealed and not append:
        raise DatasetError(
            f"{where} holds a dataset already: pass append=True to add to it, or name another folder.", path=where
        )
    facts = sealed[0].facts() if sealed else None
    if facts is not None and Spec.from_json(facts.spec) != spec:
        raise DatasetError(f"{where} holds rows of {facts.spec}, not of {spec.to_json()}.", path=where)
    place.clean()
    last = sealed[-1].manifest if sealed else None
    numbers = ray.remote(num_cpus=0)(Numbers).remote(last.first_sample + last.num_samples if last else 0)
    options = Options(
        spec=spec,
        path=where,
        numbers=numbers,
        column=column,
        metadata=tuple(metadata),
        facts=facts,
        recording={"budget_bytes": budget_bytes, "staging": staging},
    )
    # A copy: assigning to the stage would have Ray validate it anew, and ask for GPUs.
    arguments = {**stage.fn_constructor_kwargs, "recording": options}
    update = {"fn": RecordingStage, "fn_constructor_kwargs": arguments}
    processor.stages[STAGE] = stage.model_copy(update=update)  # type: ignore[attr-defined]
    return processor


def _stage_of(processor: Any) -> Any:
    stage = getattr(processor, "stages", {}).get(STAGE)
    if stage is None:
        raise SpecError(
            "recorded takes what ray.data.llm.build_processor returns for a vLLMEngineProcessorConfig, got a "
            f"{type(processor).__name__} without a {STAGE}."
        )
    if "recording" in stage.fn_constructor_kwargs:
        raise SpecError("this processor records already: build another one.")
    task = stage.fn_constructor_kwargs.get("task_type", "generate")
    if task != "generate":
        raise SpecError(f"this processor is for {task!r}: rows are recorded of requests that generate.")
    return stage
