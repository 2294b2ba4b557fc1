"""Which rows of a step are captured, and where each one goes. Runs in the worker process, once per step.

A `Batch` is what a runner adapter reads before the forward pass; a `Selection` is what the taps and the labels need.
"""

from __future__ import annotations

import itertools
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.engine.model.tap import Run
from vllm_tap.spec import wanted_tokens
from vllm_tap.vllm.runner import Batch

Int32 = npt.NDArray[np.int32]


class CapturedRequest(NamedTuple):
    """A request that is being captured, by the number that its rows carry."""

    number: int
    prompt_len: int


_NOBODY: Final = CapturedRequest(-1, 0)


class Selection(NamedTuple):
    """The captured rows of one step: R rows out of T tokens.

    `row_map` [T]: destination row of each token, -1 for none. `sources` [R]: the token of each row. `numbers` [R]: the
    request number of each row. `is_everything`: row t is token t. `ends_prompts`: no captured request has tokens of its
    prompt left after this step, as far as the host knows.
    """

    num_rows: int
    row_map: Int32
    sources: Int32
    numbers: Int32
    is_everything: bool
    ends_prompts: bool

    @property
    def runs(self) -> list[Run]:
        """The same map as contiguous pieces; made when asked for."""
        if self.is_everything:
            return [Run(0, 0, self.num_rows)]
        breaks = np.flatnonzero(np.diff(self.sources) != 1) + 1
        firsts = np.concatenate(([0], breaks, [self.num_rows]))
        return [Run(int(self.sources[a]), int(a), int(b - a)) for a, b in itertools.pairwise(firsts)]


class Selector:
    """Chooses the rows of each step.

    Attributes:
        takes_all: Whether batches of the same requests and lengths have the same selection.
    """

    def __init__(self, positions: str | tuple[int, ...]) -> None:
        self.takes_all = positions == "all"
        self._takes_generated = positions in ("all", "generated")
        self._positions = positions
        self._requests: dict[str, CapturedRequest] = {}
        self._ids: list[str] = []
        self._numbers: Int32 = np.empty(0, np.int32)
        self._prompt_lens: Int32 = np.empty(0, np.int32)

    def add(self, request_id: str, request: CapturedRequest) -> None:
        """Capture a request from now on."""
        self._requests[request_id] = request

    def remove(self, request_id: str) -> None:
        """Forget a request, if it is one of these."""
        if self._requests.pop(request_id, None) is not None:
            self._ids = []

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
        ends_prompts = bool((batch.num_computed + counts >= self._prompt_lens).all())
        has_others = self._numbers.min(initial=0) < 0
        if self.takes_all and not has_others:
            numbers = np.repeat(self._numbers, counts)
            every = np.arange(len(numbers), dtype=np.int32)
            return Selection(len(numbers), every, every, numbers, True, ends_prompts)
        # Most steps of a long generation have nothing for "prompt", "last" or prompt positions: see that early.
        if not self._takes_generated and (batch.num_computed >= self._prompt_lens).all():
            return None
        sources = wanted_tokens(self._positions, self._prompt_lens, starts, batch.num_computed)
        numbers = self._numbers[np.searchsorted(starts, sources, "right") - 1]
        if has_others:
            is_captured = numbers >= 0
            sources, numbers = sources[is_captured], numbers[is_captured]
        if not len(sources):
            return None
        row_map = np.full(starts[-1], -1, np.int32)
        row_map[sources] = np.arange(len(sources), dtype=np.int32)
        return Selection(len(sources), row_map, sources.astype(np.int32), numbers, False, ends_prompts)
