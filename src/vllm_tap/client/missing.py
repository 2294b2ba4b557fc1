"""Rows that cannot be: positions that a prompt does not have, and generated rows of one token. Client process.

The engine returns what it can; here it is said, as early as it can be known, that something will be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import PositionError, counted_from
from vllm_tap.spec import GENERATED, Spec

if TYPE_CHECKING:
    from vllm_tap.client.result import Capture

TOKENS_ONLY: Final = frozenset({"prompt", "prompt_token_ids", "cache_salt"})
"""A prompt of these entries has the length of its token ids; pictures among them make it longer."""

WAY_OUT: Final = 'or take what there is with Spec(..., missing="skip"): `row_labels` says which sample each row is of.'


def check_prompts(spec: Spec, prompts: Iterable[Any], has_spec: Callable[[int], bool] = lambda sample: True) -> None:
    """Refuse prompts of known length that lack a position that is asked for; of those samples that have this Spec.

    Raises:
        PositionError: The first of them.
    """
    if spec.missing == "skip" or not spec.least_prompt_len:
        return
    for sample, prompt in enumerate(prompts):
        if not has_spec(sample):
            continue
        if isinstance(prompt, Mapping) and prompt.keys() <= TOKENS_ONLY and "prompt_token_ids" in prompt:
            prompt_len = len(prompt["prompt_token_ids"])
            if prompt_len < spec.least_prompt_len:
                raise _too_short(spec, sample, prompt_len)


def check_params(spec: Spec, params: Any, sample: int) -> None:
    """Refuse parameters of a request that generates too little for the positions that are asked for.

    Raises:
        PositionError: It pools, or generates one token.
    """
    if spec.missing == "skip" or spec.positions not in GENERATED:
        return
    if not hasattr(params, "max_tokens"):
        raise PositionError(
            f"positions={spec.positions!r} of an engine that pools: it generates nothing. Ask for other positions.",
            sample=sample,
        )
    if params.max_tokens == 1:
        raise _not_generated(spec, sample, 0, "max_tokens=1")


def check_result(
    spec: Spec, sequences: Sequences, result: Capture, has_spec: Callable[[int], bool] = lambda sample: True
) -> None:
    """Refuse a capture in which a sequence lacks rows that were asked for; of those samples that have this Spec.

    Raises:
        PositionError: The first of them. `result` is the capture.
    """
    slots = sequences.keys
    lacking = [] if spec.missing == "skip" else [n for n in lacking_rows(spec, sequences) if has_spec(slots[n][0])]
    if lacking:
        raise _error_with(result, spec, sequences, lacking)


def _error_with(result: Capture, spec: Spec, sequences: Sequences, lacking: list[int]) -> PositionError:
    # Made here: in the frame that raises it, a variable would make a circle that keeps the rows until it is collected.
    sample, completion = sequences.keys[lacking[0]]
    if spec.positions in GENERATED:
        error = _not_generated(spec, sample, completion, "it stopped at its first")
    else:
        error = _too_short(spec, sample, int(sequences.prompt_lens[lacking[0]]))
    error.identity.update(completion=completion, result=result)
    error.args = (f"{error} {len(lacking)} of {len(sequences.slots)} sequences lack rows; `result` has the others.",)
    return error


def check_sample(spec: Spec, sample: int, output: Any, result: Capture) -> None:
    """Refuse the capture of one sample of a stream, which has ended, if it lacks rows that were asked for.

    Raises:
        PositionError: It does.
    """
    with counted_from(sample):
        check_result(spec, Sequences([output], spec.positions), result)


def lacking_rows(spec: Spec, sequences: Sequences) -> npt.NDArray[np.int64]:
    """Return the numbers of the sequences that lack rows that are asked for."""
    if spec.positions in GENERATED:
        return np.flatnonzero(np.diff(sequences.wanted_starts) == 0)
    return np.flatnonzero(sequences.prompt_lens < spec.least_prompt_len)


def _too_short(spec: Spec, sample: int, prompt_len: int) -> PositionError:
    assert isinstance(spec.positions, tuple)
    absent = [number for number in spec.positions if not -prompt_len <= number < prompt_len]
    listed = ", ".join(map(str, absent))
    return PositionError(
        f"prompt {sample} has {prompt_len} tokens and no position {listed}, which is asked for by "
        f"positions={list(spec.positions)}. Leave out prompts of fewer than {spec.least_prompt_len} tokens, {WAY_OUT}",
        sample=sample,
        prompt_len=prompt_len,
    )


def _not_generated(spec: Spec, sample: int, completion: int, why: str) -> PositionError:
    return PositionError(
        f"prompt {sample}, completion {completion} has no row for positions={spec.positions!r}: it generates one token "
        f"({why}), and the last one never enters the model. Generate at least two, {WAY_OUT}",
        sample=sample,
        completion=completion,
    )
