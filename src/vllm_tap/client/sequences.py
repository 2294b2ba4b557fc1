"""The final sequences of a capture's requests: what the engine's outputs say every row must be. Client process."""

from __future__ import annotations

import copy
import struct
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_tap.positions import Positions, Tokens
from vllm_tap.spec import Choice, ranges, wanted_tokens

Ints = npt.NDArray[np.int64]


class TokenArrays:
    """Token ids of an engine's requests as arrays, read while it computes.

    Behind the last step they are nowhere in the caches: 256 sequences of 64 + 128 tokens take 2 ms there.
    """

    def __init__(self) -> None:
        # A list is found again by its identity, so it is kept.
        self._known: dict[int, tuple[Sequence[int], array[int]]] = {}

    def read(self, lists: Iterable[Sequence[int]]) -> None:
        """Read what lists have gained, which vLLM will return with its outputs: they grow, or are cut short at last."""
        for tokens in lists:
            _, read = self._known.setdefault(id(tokens), (tokens, array("i")))
            if len(read) < len(tokens):
                read.frombytes(_packed(tokens[len(read) :]))

    def append(self, target: array[int], tokens: Sequence[int], length: int) -> None:
        """Append the first tokens of a list: what was read of it, and the rest."""
        known = self._known.get(id(tokens))
        num_read = 0
        if known is not None:
            read = known[1]
            num_read = len(read)
            target.extend(read if num_read <= length else read[:length])
        if num_read < length:
            target.frombytes(_packed(tokens[num_read:length]))


class Sequences:
    """All sequences of a capture behind one another, as flat arrays over token positions.

    Args:
        outputs: vLLM's, by sample; None for a sample without one.
        positions: Which rows are asked for, or a function that says it of each sample.
        ahead: What was read of them ahead.

    Attributes:
        slots: {(sample, completion): number of the sequence}. To be replaced, never changed.
        keys: The same, by the number.
        request_ids: {sample: what its output says that its request was called}.
        starts: int64 [S + 1], first flat index of each sequence; the rows that exist are the prompt and all generated
            tokens but the last, which never enters the model.
        prompt_lens: int64 [S], tokens of the prompt of each sequence.
        token_ids: int32 [starts[-1]].
        wanted: int64, the flat indices that the specification asks for, ascending.
        wanted_starts: int64 [S + 1], where the wanted rows of each sequence begin in `wanted`.
    """

    def __init__(
        self, outputs: Sequence[Any], positions: Choice | Callable[[int], Choice], ahead: TokenArrays | None = None
    ) -> None:
        ahead = TokenArrays() if ahead is None else ahead
        slots: dict[tuple[int, int], int] = {}
        self.request_ids: dict[int, str] = {}
        token_ids = array("i")
        lengths: list[int] = []
        prompt_lens: list[int] = []
        for sample, output in enumerate(outputs):
            if output is None:
                continue
            self.request_ids[sample] = output.request_id
            prompt = output.prompt_token_ids
            prompt_len = len(prompt)
            for completion, generated in _completions(output):
                slots[sample, completion] = len(lengths)
                # A pooling request has no generated tokens, and the last generated token never enters the model.
                num_generated = max(len(generated) - 1, 0)
                ahead.append(token_ids, prompt, prompt_len)
                ahead.append(token_ids, generated, num_generated)
                lengths.append(prompt_len + num_generated)
                prompt_lens.append(prompt_len)
        self.slots = slots
        self.starts = _starts(lengths)
        self.prompt_lens = np.array(prompt_lens, np.int64)
        self.token_ids = np.frombuffer(token_ids, np.int32)
        self.wanted, self.wanted_starts = self._wanted(positions)

    @property
    def slots(self) -> dict[tuple[int, int], int]:
        return self._slots

    @slots.setter
    def slots(self, slots: dict[tuple[int, int], int]) -> None:
        self._slots, self.keys = slots, list(slots)

    def _wanted(self, positions: Choice | Callable[[int], Choice]) -> tuple[Ints, Ints]:
        if not callable(positions):
            return self._with_starts(self._chosen(positions, np.arange(len(self.slots))))
        of_choice: dict[Choice, list[int]] = {}
        for (sample, _), number in self.slots.items():
            of_choice.setdefault(positions(sample), []).append(number)
        found = [self._chosen(choice, np.array(numbers)) for choice, numbers in of_choice.items()]
        return self._with_starts(np.sort(np.concatenate([np.empty(0, np.int64), *found])))

    def _with_starts(self, wanted: Ints) -> tuple[Ints, Ints]:
        return wanted, self.starts if len(wanted) == self.starts[-1] else np.searchsorted(wanted, self.starts)

    def _chosen(self, choice: Choice, numbers: Ints) -> Ints:
        """Return the flat indices, ascending, that a choice takes of some sequences."""
        if not isinstance(choice, Positions) and len(numbers) == len(self.slots):
            return wanted_tokens(choice, self.prompt_lens, self.starts, np.zeros_like(self.prompt_lens))
        firsts, prompt_lens = self.starts[:-1][numbers], self.prompt_lens[numbers]
        lengths = self.starts[1:][numbers] - firsts
        flat = ranges(firsts, lengths)
        if not isinstance(choice, Positions):
            starts = _starts(lengths)
            return flat[wanted_tokens(choice, prompt_lens, starts, np.zeros_like(prompt_lens))]
        firsts, prompt_lens, of_each = (np.repeat(each, lengths) for each in (firsts, prompt_lens, lengths))
        tokens = Tokens(flat - firsts, prompt_lens, of_each, self.token_ids[flat])
        return flat[choice.choose(tokens)]

    @classmethod
    def of_rows(cls, completion: int, positions: npt.NDArray[np.int32], token_ids: npt.NDArray[np.int32]) -> Sequences:
        """Return one sequence of which some rows are known, and nothing else."""
        known = cls.__new__(cls)
        length = int(positions.max(initial=-1)) + 1
        known.slots, known.request_ids, known.prompt_lens = {(0, completion): 0}, {}, np.zeros(1, np.int64)
        known.starts, known.wanted_starts = np.array([0, length]), np.array([0, len(positions)])
        known.wanted = positions.astype(np.int64)
        known.token_ids = np.zeros(length, np.int32)
        known.token_ids[positions] = token_ids
        return known

    @classmethod
    def joined(cls, parts: Sequence[Sequences]) -> tuple[Sequences, Ints, Ints]:
        """Return the sequences of several captures, which have samples of their own, as one: by sample.

        Returns:
            The sequences; of each wanted row the place in `parts` of the capture that has it, int64 [R]; and its number
            there, the same.
        """
        lengths, counts = (
            np.concatenate([np.diff(getattr(part, starts)) for part in parts]) for starts in ("starts", "wanted_starts")
        )
        slots = [slot for part in parts for slot in part.keys]
        order = np.argsort(np.array([sample for sample, _ in slots], np.int64), kind="stable")
        tokens, rows = (ranges(_starts(of_each)[order], of_each[order]) for of_each in (lengths, counts))
        whole = cls.__new__(cls)
        whole.slots = {slots[was]: number for number, was in enumerate(order.tolist())}
        whole.request_ids = {sample: name for part in parts for sample, name in part.request_ids.items()}
        whole.starts, whole.wanted_starts = _starts(lengths[order]), _starts(counts[order])
        whole.prompt_lens = np.concatenate([part.prompt_lens for part in parts])[order]
        whole.token_ids = np.concatenate([part.token_ids for part in parts])[tokens]
        positions = np.concatenate([part.position_of(part.wanted)[1] for part in parts])
        whole.wanted = positions[rows] + np.repeat(whole.starts[:-1], counts[order])
        numbers = [np.arange(len(part.wanted)) for part in parts]
        part_of = np.repeat(np.arange(len(parts)), [len(each) for each in numbers])
        return whole, part_of[rows], np.concatenate(numbers)[rows]

    def only(self, number: int) -> Sequences:
        """Return one sequence alone, as that of the first sample."""
        alone = copy.copy(self)
        sample, completion = self.keys[number]
        (start, stop), (first, last) = self.starts[number : number + 2], self.wanted_starts[number : number + 2]
        alone.slots, alone.request_ids = {(0, completion): 0}, {0: self.request_ids[sample]}
        alone.starts, alone.wanted_starts = np.array([0, stop - start]), np.array([0, last - first])
        alone.prompt_lens, alone.token_ids = self.prompt_lens[number : number + 1], self.token_ids[start:stop]
        alone.wanted = self.wanted[first:last] - start
        return alone

    def position_of(self, flat: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the sequence number and the position of flat indices."""
        sequence = np.searchsorted(self.starts, flat, side="right") - 1
        return sequence, flat - self.starts[sequence]


def _starts(lengths: npt.ArrayLike) -> Ints:
    """Return where runs of these lengths begin that stand one behind the other, and where the last one ends."""
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def _packed(tokens: Sequence[int]) -> bytes:
    """Return token ids as int32: `struct` reads a list at 10 to 20 ns an element, numpy and `array` at 20 to 60."""
    return struct.pack(f"={len(tokens)}i", *tokens)


def _completions(output: Any) -> list[tuple[int, Sequence[int]]]:
    """Return (number, generated token ids) per completion; a pooling output is one completion without tokens."""
    outputs = getattr(output, "outputs", None)
    if isinstance(outputs, list):
        return [(completion.index, completion.token_ids) for completion in outputs]
    return [(0, ())]
