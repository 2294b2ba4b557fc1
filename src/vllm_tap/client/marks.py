"""Checks of what a user of a `Recording` marks and gives back. Client process."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from vllm_tap.errors import RowsMissingError, SpecError
from vllm_tap.positions import Begin
from vllm_tap.spec import MAX_NUMBER


def require_list(params: Any) -> None:
    """Refuse what is no list of parameters.

    Raises:
        SpecError: It is something else.
    """
    if isinstance(params, str | Mapping) or not isinstance(params, Sequence):
        raise SpecError(
            f"mark_all takes a list of parameters, one for each sample, got {type(params).__name__}: for one request, "
            "mark(params, sample)."
        )


def sample_number(sample: Any) -> int:
    """Return the number of a sample as a plain integer, which alone the workers read.

    Raises:
        SpecError: It is no place in a list.
    """
    number = -1 if isinstance(sample, bool) else getattr(sample, "__index__", lambda: -1)()
    if not 0 <= number <= MAX_NUMBER:
        raise SpecError(f"sample is the place of the request's output in a list, 0 or more, got {sample!r}.")
    return int(number)


def cache_bound(params: Any, begin: Begin) -> tuple[int, int] | None:
    """Return how far a request may read the prefix cache, as its mark says it; None if it may not at all.

    Only where its own parameters let it: some skip the cache, as those that ask for log probabilities of the prompt.
    """
    may_read = hasattr(params, "extra_args") and not params.skip_reading_prefix_cache
    return (begin.from_start, begin.from_end) if may_read and begin.from_start else None


def checked_outputs(outputs: Iterable[Any], marked: Collection[int]) -> list[Any]:
    """Return outputs as a list, given the numbers of the samples that were marked.

    Raises:
        SpecError: Something that is no output.
        RowsMissingError: An output of a sample that was not marked.
    """
    outputs = list(outputs)
    for sample, output in enumerate(outputs):
        if output is None:
            continue
        if not (hasattr(output, "request_id") and hasattr(output, "outputs")):
            raise SpecError(f"outputs are vLLM's, by sample: sample {sample} has a {type(output).__name__}.")
        if sample not in marked:
            raise RowsMissingError(
                f"there is an output of sample {sample}, which was not marked: this Recording marked {len(marked)} of "
                f"{len(outputs)} samples. Give every request a mark of its own, by mark(params, {sample}) or mark_all; "
                "for a request that is not to be captured, give None as its output.",
                sample=sample,
            )
    return outputs
