"""The final sequences of a capture's requests: what the engine's outputs say every row must be. Client process."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from vllm_tap.spec import selected

Tokens: TypeAlias = Sequence[int] | npt.NDArray[np.int32]


class Slot(NamedTuple):
    """One sequence: a sample, and which of its completions."""

    sample: int
    completion: int


class PromptArrays:
    """Token ids of prompts as arrays, made while the engine computes: a prompt of 1000 takes some 20 microseconds."""

    def __init__(self) -> None:
        # A list is found again by its identity, so it is kept.
        self._known: dict[int, tuple[Sequence[int], npt.NDArray[np.int32]]] = {}

    def add(self, prompts: Iterable[Sequence[int]]) -> None:
        """Take prompts whose lists vLLM will return with its outputs."""
        for prompt in prompts:
            self._known[id(prompt)] = prompt, np.array(prompt, np.int32)

    def of(self, prompt: Sequence[int]) -> Tokens:
        """Return the array of a prompt, or the prompt itself if it is not one of those taken, or longer by now."""
        known = self._known.get(id(prompt))
        return known[1] if known is not None and len(known[1]) == len(prompt) else prompt


class Sequences:
    """All sequences of a capture behind one another, as flat arrays over token positions.

    Args:
        outputs: vLLM's, by sample; None for a sample without one.
        positions: Which rows are asked for.
        prompts: Those that were read ahead.

    Attributes:
        slots: {(sample, completion): number of the sequence}.
        starts: int64 [S + 1], first flat index of each sequence; the rows that exist are the prompt and all generated
            tokens but the last, which never enters the model.
        token_ids: int32 [starts[-1]].
        wanted: int64, the flat indices that the specification asks for, ascending.
        wanted_starts: int64 [S + 1], where the wanted rows of each sequence begin in `wanted`.
    """

    def __init__(
        self, outputs: Sequence[Any], positions: str | tuple[int, ...], prompts: PromptArrays | None = None
    ) -> None:
        self.slots: dict[tuple[int, int], int] = {}
        pieces: list[Tokens] = []
        lengths: list[int] = []
        prompt_lens: list[int] = []
        for sample, output in enumerate(outputs):
            if output is None:
                continue
            prompt = output.prompt_token_ids
            tokens = prompt if prompts is None else prompts.of(prompt)
            for completion, generated in _completions(output):
                self.slots[sample, completion] = len(lengths)
                pieces += [tokens, generated[:-1]]
                # A pooling request has no generated tokens, and the last generated token never enters the model.
                lengths.append(len(prompt) + max(len(generated) - 1, 0))
                prompt_lens.append(len(prompt))
        self.starts = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        self.token_ids = _flat(pieces, int(self.starts[-1]))
        self.wanted, self.wanted_starts = self._wanted(positions, prompt_lens)

    def _wanted(
        self, positions: str | tuple[int, ...], prompt_lens: list[int]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        if positions == "all":
            return np.arange(self.starts[-1]), self.starts
        lengths = np.diff(self.starts)
        at = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], lengths)
        wanted = np.flatnonzero(selected(positions, np.repeat(np.array(prompt_lens), lengths), at))
        return wanted, np.searchsorted(wanted, self.starts)

    def position_of(self, flat: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the sequence number and the position of flat indices."""
        sequence = np.searchsorted(self.starts, flat, side="right") - 1
        return sequence, flat - self.starts[sequence]


def _flat(pieces: list[Tokens], num_tokens: int) -> npt.NDArray[np.int32]:
    """Return all token ids behind one another."""
    flat = np.empty(num_tokens, np.int32)
    place = 0
    for piece in pieces:
        if isinstance(piece, np.ndarray):
            flat[place : place + len(piece)] = piece
        else:
            # numpy reads a list at 25 to 60 ns an element, `struct` at 15 to 20.
            struct.pack_into(f"={len(piece)}i", flat.data, 4 * place, *piece)
        place += len(piece)
    return flat


def _completions(output: Any) -> list[tuple[int, Sequence[int]]]:
    """Return (number, generated token ids) per completion; a pooling output is one completion without tokens."""
    outputs = getattr(output, "outputs", None)
    if isinstance(outputs, list):
        return [(completion.index, completion.token_ids) for completion in outputs]
    return [(0, ())]
