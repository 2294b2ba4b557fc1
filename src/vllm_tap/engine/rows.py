"""Which rows of a step are captured, and where each one goes. Runs in the worker process, once per step.

A `Batch` is what a runner adapter reads before the forward pass; a `Selection` is what the taps and the labels need.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.spec import selected

Int32 = npt.NDArray[np.int32]


class Batch(NamedTuple):
    """One step as the runner sees it. Flat rows are tokens, request after request.

    `starts` [num_reqs + 1] and `num_computed` [num_reqs] are the host's values; `positions` and `token_ids` are the
    runner's own tensors [>= num_tokens] on the device, which under asynchronous scheduling alone are exact.
    """

    request_ids: list[str]
    starts: Int32
    num_computed: Int32
    positions: torch.Tensor
    token_ids: torch.Tensor


class CapturedRequest(NamedTuple):
    """A request that is being captured, by the number that its rows carry."""

    number: int
    prompt_len: int


class Run(NamedTuple):
    """A contiguous piece of the batch: rows `source` to `source + num_rows` become rows `target` and following."""

    source: int
    target: int
    num_rows: int


class Selection(NamedTuple):
    """The captured rows of one step: R rows out of T tokens.

    `row_map` [T]: destination row of each token, -1 for none. `sources` [R]: the token of each row. `numbers` [R]: the
    request number of each row. `runs`: the same map as contiguous pieces.
    """

    num_rows: int
    row_map: Int32
    sources: Int32
    numbers: Int32
    runs: list[Run]


def select(batch: Batch, requests: Mapping[str, CapturedRequest], positions: str | tuple[int, ...]) -> Selection | None:
    """Choose the rows of a step that are asked for, or None when there are none.

    Cost: one dictionary look-up per request, a few numpy calls per step; one more per request when `positions` is not
    "all". No device sync.
    """
    found = [requests.get(request_id) for request_id in batch.request_ids]
    starts = batch.starts
    num_tokens = int(starts[len(found)])
    numbers = np.fromiter((-1 if r is None else r.number for r in found), np.int32, len(found))
    token_numbers = np.repeat(numbers, np.diff(starts[: len(found) + 1]))
    if positions != "all":
        _deselect(token_numbers, batch, found, positions)
    elif None not in found:
        every = np.arange(num_tokens, dtype=np.int32)
        return Selection(num_tokens, every, every, token_numbers, [Run(0, 0, num_tokens)])
    sources = np.flatnonzero(token_numbers >= 0).astype(np.int32)
    if not len(sources):
        return None
    row_map = np.full(num_tokens, -1, np.int32)
    row_map[sources] = np.arange(len(sources), dtype=np.int32)
    return Selection(len(sources), row_map, sources, token_numbers[sources], _runs(sources))


def _deselect(
    token_numbers: Int32, batch: Batch, found: list[CapturedRequest | None], positions: str | tuple[int, ...]
) -> None:
    """Set the numbers of tokens at positions that nobody asked for to -1."""
    for index, request in enumerate(found):
        if request is None:
            continue
        start, stop = int(batch.starts[index]), int(batch.starts[index + 1])
        first = int(batch.num_computed[index])
        wanted = selected(positions, request.prompt_len, first, first + stop - start)
        if wanted is not None:
            token_numbers[start:stop][~wanted] = -1


def _runs(sources: Int32) -> list[Run]:
    breaks = np.flatnonzero(np.diff(sources) != 1) + 1
    firsts = np.concatenate(([0], breaks, [len(sources)]))
    return [Run(int(sources[a]), int(a), int(b - a)) for a, b in itertools.pairwise(firsts)]
