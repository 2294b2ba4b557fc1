"""Parts of a capture, which ran in engines of their own, as one result. Client process."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from vllm_tap.client.owned import Place
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import CaptureError


def joined(parts: Sequence[Capture], outputs: list[Any]) -> Capture:
    """Return captures of one Spec as one, in the order of the samples.

    Args:
        parts: Each has samples that no other has.
        outputs: Of all samples.

    Raises:
        CaptureError: The engines have not captured the same streams and layers.
    """
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for part in parts:
        if part.layers != first.layers:
            raise CaptureError(f"engines of one model captured {first.layers} and {part.layers}: capture again.")
    sequences, part_of, numbers = Sequences.joined([part.sequences for part in parts])
    result = Capture(
        first.spec,
        outputs,
        sequences,
        [JoinedRows(parts, part_of, numbers)],
        first.conventions,
        first.routing,
        list(first.layers),
        first.num_layers,
        first.has_final_norm,
    )
    result.model = first.model
    known = [name for name in first.seconds if all(name in part.seconds for part in parts)]
    result.seconds = {name: max(part.seconds[name] for part in parts) for name in known}
    return result


class JoinedRows:
    """Rows of several captures, by sample.

    Args:
        parts: The captures.
        part_of: Of each row the part that has it.
        numbers: Of each row its number there, which ascend in each part.
    """

    def __init__(self, parts: Sequence[Capture], part_of: np.ndarray[Any, Any], numbers: np.ndarray[Any, Any]) -> None:
        self._parts, self._part_of, self._numbers = parts, part_of, numbers

    @property
    def places(self) -> Collection[Place]:
        """The streams and layers, of which each part has all."""
        return [(stream, layer) for stream, layers in self._parts[0].layers.items() for layer in layers]

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `start` to `stop`: as their part does where one has all of them, else a copy."""
        part_of, numbers = self._part_of[start:stop], self._numbers[start:stop]
        if not len(numbers):
            return self._parts[0].rows(stream, layer, 0, 0)
        breaks = (np.flatnonzero(np.diff(part_of)) + 1).tolist()
        found = [
            self._parts[part_of[first]].rows(stream, layer, int(numbers[first]), int(numbers[last - 1]) + 1)
            for first, last in itertools.pairwise([0, *breaks, len(numbers)])
        ]
        return found[0] if len(found) == 1 else torch.cat(found)
