"""Which rows of a step are captured, and where each one goes. Runs in the worker process, once per step.

A `Batch` is what a runner adapter reads before the forward pass; a `Selection` is what the taps and the labels need.
"""

from __future__ import annotations

import itertools
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.engine.model.tap import Run
from vllm_tap.positions import Positions, Tokens
from vllm_tap.spec import Choice, ranges, takes_generated, wanted_tokens
from vllm_tap.vllm.runner import Batch

Int32 = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]


class CapturedRequest(NamedTuple):
    """A request that is being captured, by the number that its rows carry; `choice` numbers its positions."""

    number: int
    prompt_len: int
    choice: int


_NOBODY: Final = CapturedRequest(-1, 0, -1)


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

    Args:
        positions: Those of requests that name none of their own.
        drafts: Whether the engine decodes speculatively. Then its host does not know which generated token comes next:
            of those an expression takes all.
    """

    def __init__(self, positions: Choice, drafts: bool = False) -> None:
        self._drafts = drafts
        self._choices: dict[Choice, int] = {positions: 0}
        self._requests: dict[str, CapturedRequest] = {}
        self._ids: list[str] = []
        self._numbers: Int32 = np.empty(0, np.int32)
        self._prompt_lens: Int32 = np.empty(0, np.int32)
        self._choice_of: Int32 = np.empty(0, np.int32)
        self._in_batch: list[tuple[int, Choice]] = []
        self._takes_generated = False

    @property
    def takes_all(self) -> bool:
        """True if batches of the same requests and lengths have the same selection."""
        return list(self._choices) == ["all"]

    def add(self, request_id: str, number: int, prompt_len: int, positions: Choice | None = None) -> None:
        """Capture a request from now on."""
        choice = 0 if positions is None else self._choices.setdefault(positions, len(self._choices))
        self._requests[request_id] = CapturedRequest(number, prompt_len, choice)
        self._ids = []

    def remove(self, request_id: str) -> None:
        """Forget a request, if it is one of these."""
        if self._requests.pop(request_id, None) is not None:
            self._ids = []

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def select(self, batch: Batch) -> Selection | None:
        """Choose the rows of a step that are asked for, or None when there are none.

        Cost: one look-up per request unless they are those of the step before, and a few numpy calls for each choice
        of positions among them; for an expression, of arrays as long as the step. No device sync.
        """
        if batch.request_ids != self._ids:
            self._look_up(batch.request_ids)
        return self._choose(batch, batch.starts[: len(batch.request_ids) + 1])

    def _look_up(self, request_ids: list[str]) -> None:
        self._ids = request_ids
        found = [self._requests.get(request_id, _NOBODY) for request_id in request_ids]
        self._numbers = np.array([request.number for request in found], np.int32)
        self._prompt_lens = np.array([request.prompt_len for request in found], np.int32)
        self._choice_of = np.array([request.choice for request in found], np.int32)
        known = list(self._choices)
        self._in_batch = [(number, known[number]) for number in set(self._choice_of.tolist()) if number >= 0]
        self._takes_generated = any(takes_generated(choice) for _, choice in self._in_batch)

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
        sources, requests = self._sources(starts, batch.num_computed, has_others)
        if not len(sources):
            return None
        row_map = np.full(starts[-1], -1, np.int32)
        row_map[sources] = np.arange(len(sources), dtype=np.int32)
        return Selection(len(sources), row_map, sources.astype(np.int32), self._numbers[requests], False, ends_prompts)

    def _sources(self, starts: Int32, begins: Int32, has_others: bool) -> tuple[Ints, Ints]:
        """Return the tokens that are asked for, ascending, and the place of the request of each in the batch."""
        if len(self._in_batch) == 1:
            sources = self._tokens_of(self._in_batch[0][1], self._prompt_lens, starts, begins)
            requests = np.searchsorted(starts, sources, "right") - 1
            if has_others:
                mine = self._numbers[requests] >= 0
                sources, requests = sources[mine], requests[mine]
            return sources, requests
        found = [self._sources_of(number, choice, starts, begins) for number, choice in self._in_batch]
        sources, requests = (np.concatenate([np.empty(0, np.int64), *parts]) for parts in zip(*found, strict=True))
        order = np.argsort(sources)
        return sources[order], requests[order]

    def _sources_of(self, number: int, choice: Choice, starts: Int32, begins: Int32) -> tuple[Ints, Ints]:
        """Return the same of the requests with one choice of positions: one of many looks at no others."""
        mine = np.flatnonzero(self._choice_of == number)
        firsts, counts = starts[:-1][mine], (starts[1:] - starts[:-1])[mine]
        own_starts = np.concatenate(([0], np.cumsum(counts)))
        tokens = self._tokens_of(choice, self._prompt_lens[mine], own_starts, begins[mine])
        return ranges(firsts, counts)[tokens], mine[np.searchsorted(own_starts, tokens, "right") - 1]

    def _tokens_of(self, choice: Choice, prompt_lens: Int32, starts: Ints | Int32, begins: Int32) -> Ints:
        """Return the tokens that a choice takes, of requests whose tokens lie behind one another."""
        if not isinstance(choice, Positions):
            return wanted_tokens(choice, prompt_lens, starts, begins)
        counts = starts[1:] - starts[:-1]
        lens = np.repeat(prompt_lens, counts).astype(np.int64)
        positions = np.arange(starts[-1], dtype=np.int64) - np.repeat(starts[:-1] - begins, counts)
        possible = choice.bounds(Tokens(positions, lens)).possible
        if self._drafts and choice.takes_generated:
            possible = possible | (positions >= lens)
        return np.flatnonzero(possible)
