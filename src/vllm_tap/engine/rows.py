"""Which rows of a step are captured, and where each one goes. Runs in the worker process, once per step.

A `Batch` is what a runner adapter reads before the forward pass; a `Selection` is what the taps and the labels need.
"""

from __future__ import annotations

import itertools
from typing import Final, NamedTuple

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


_NOBODY: Final = CapturedRequest(-1, 0)


class Run(NamedTuple):
    """A contiguous piece of the batch: rows `source` to `source + num_rows` become rows `target` and following."""

    source: int
    target: int
    num_rows: int


class Selection(NamedTuple):
    """The captured rows of one step: R rows out of T tokens.

    `row_map` [T]: destination row of each token, -1 for none. `sources` [R]: the token of each row. `numbers` [R]: the
    request number of each row. `runs`: the same map as contiguous pieces. `is_everything`: row t is token t.
    `ends_prompts`: no captured request has tokens of its prompt left after this step, as far as the host knows.
    """

    num_rows: int
    row_map: Int32
    sources: Int32
    numbers: Int32
    runs: list[Run]
    is_everything: bool
    ends_prompts: bool


class Selector:
    """Chooses the rows of each step.

    Attributes:
        takes_all: Whether batches of the same requests and lengths have the same selection.
    """

    def __init__(self, positions: str | tuple[int, ...]) -> None:
        self.takes_all = positions == "all"
        self._positions = positions
        self._requests: dict[str, CapturedRequest] = {}
        self._ids: list[str] = []
        self._numbers: Int32 = np.empty(0, np.int32)
        self._prompt_lens: Int32 = np.empty(0, np.int32)

    def add(self, request_id: str, request: CapturedRequest) -> None:
        """Capture a request from now on."""
        self._requests[request_id] = request

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def select(self, batch: Batch) -> Selection | None:
        """Choose the rows of a step that are asked for, or None when there are none.

        Cost: one look-up per request unless they are those of the step before, and a few numpy calls. No device sync.
        """
        if batch.request_ids != self._ids:
            self._look_up(batch.request_ids)
        return self._choose(batch, batch.starts[: len(batch.request_ids) + 1])

    def _look_up(self, request_ids: list[str]) -> None:
        self._ids = request_ids
        found = [self._requests.get(request_id, _NOBODY) for request_id in request_ids]
        self._numbers = np.array([request.number for request in found], np.int32)
        self._prompt_lens = np.array([request.prompt_len for request in found], np.int32)

    def _choose(self, batch: Batch, starts: Int32) -> Selection | None:
        counts = starts[1:] - starts[:-1]
        numbers = np.repeat(self._numbers, counts)
        ends_prompts = bool((batch.num_computed + counts >= self._prompt_lens).all())
        if not self.takes_all:
            # Most steps of a long generation have nothing for "prompt", "last" or prompt positions: see that early.
            if self._positions != "generated" and (batch.num_computed >= self._prompt_lens).all():
                return None
            positions = np.arange(len(numbers)) + np.repeat(batch.num_computed - starts[:-1], counts)
            wanted = selected(self._positions, np.repeat(self._prompt_lens, counts), positions)
            numbers = np.where(wanted, numbers, np.int32(-1))
        elif self._numbers.min(initial=0) >= 0:
            every = np.arange(len(numbers), dtype=np.int32)
            return Selection(len(numbers), every, every, numbers, [Run(0, 0, len(numbers))], True, ends_prompts)
        sources = np.flatnonzero(numbers >= 0).astype(np.int32)
        if not len(sources):
            return None
        row_map = np.full(len(numbers), -1, np.int32)
        row_map[sources] = np.arange(len(sources), dtype=np.int32)
        return Selection(len(sources), row_map, sources, numbers[sources], _runs(sources), False, ends_prompts)


def _runs(sources: Int32) -> list[Run]:
    breaks = np.flatnonzero(np.diff(sources) != 1) + 1
    firsts = np.concatenate(([0], breaks, [len(sources)]))
    return [Run(int(sources[a]), int(a), int(b - a)) for a, b in itertools.pairwise(firsts)]
