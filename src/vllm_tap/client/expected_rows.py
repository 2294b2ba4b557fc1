"""The number of rows that a capture will have, as far as its requests tell. Client process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vllm_tap.positions import Positions, Tokens
from vllm_tap.spec import Choice
from vllm_tap.vllm import frontend


class ExpectedRows:
    """A function that says how many rows there will be: fewer when a request ends before it has all its tokens.

    Args:
        llm: A `vllm.LLM` whose requests are all of this capture.
        positions: Which rows are asked for; or of how many samples which, by which each counts as the average of all.
        num_requests: Requests that there will be; those that were not queued yet count like the others.
    """

    def __init__(self, llm: Any, positions: Choice | Mapping[Choice, int], num_requests: int) -> None:
        self._llm, self._num_requests = llm, num_requests
        self._positions = positions if isinstance(positions, Mapping) else {positions: 1}
        self._running: dict[str, Any] = {}
        self._num_known = self._num_rows = 0

    def __call__(self) -> int:
        """Return the number. Cost: some microseconds for each request."""
        now = frontend.progress(self._llm)
        for name in now.keys() - self._running.keys():
            self._running[name] = now[name]
            self._num_known += 1
            self._num_rows += self._most(now[name])
        for name in self._running.keys() - now.keys():
            state = self._running.pop(name)
            self._num_rows += self._of(state) - self._most(state)
        return self._num_rows * self._num_requests // max(self._num_known, 1)

    def _most(self, state: Any) -> int:
        progress = frontend.progress_of(state)
        return self._average(progress.num_prompt, progress.num_most)

    def _of(self, state: Any) -> int:
        progress = frontend.progress_of(state)
        return self._average(progress.num_prompt, progress.num_generated)

    def _average(self, num_prompt: int, num_generated: int) -> int:
        counts = [num_rows(positions, num_prompt, num_generated) * n for positions, n in self._positions.items()]
        return sum(counts) // sum(self._positions.values())


def num_rows(positions: Choice, num_prompt: int, num_generated: int) -> int:
    """Return how many rows of a sequence workers write.

    The last token of a sequence never enters the model.
    """
    behind = max(num_generated - 1, 0)
    counts = {"all": num_prompt + behind, "prompt": num_prompt, "generated": behind}
    if isinstance(positions, str):
        return counts.get(positions, 1)
    if isinstance(positions, Positions):
        tokens = Tokens(np.arange(counts["all"]), np.full(counts["all"], num_prompt))
        return int(positions.bounds(tokens).possible.sum())
    return len({position % num_prompt for position in positions if -num_prompt <= position < num_prompt})
