"""The Specs of the samples of a capture: one for all of them, or one for each. Client process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm_tap.errors import SpecError
from vllm_tap.spec import Choice, Spec


class Wishes:
    """Specs by sample.

    Args:
        given: A `Spec`, or a sequence with one for each sample.

    Attributes:
        distinct: Those that differ, in the order of the first sample of each.
        is_one: Whether all are equal.
        shipped: The positions that workers are asked for: {positions: samples}.

    Raises:
        SpecError: It is something else.
    """

    def __init__(self, given: Any) -> None:
        self._is_list = not isinstance(given, Spec)
        self._all = _listed(given) if self._is_list else [given]
        numbers: dict[Spec, int] = {}
        self._number_of = [numbers.setdefault(spec, len(numbers)) for spec in self._all]
        self._numbers = numbers
        self.distinct = list(numbers)
        self.is_one = len(numbers) == 1
        self.shipped: dict[Choice, int] = {}
        for spec in self._all:
            self.shipped[spec.shipped_positions] = self.shipped.get(spec.shipped_positions, 0) + 1

    def __iter__(self) -> Iterator[Spec]:
        """Go through the distinct ones, in the order of the first sample of each."""
        return iter(self.distinct)

    def of(self, sample: int) -> Spec:
        """Return the Spec of a sample.

        Raises:
            SpecError: The list has none for it.
        """
        if not self._is_list:
            return self._all[0]
        if sample >= len(self._all):
            raise SpecError(f"sample {sample} has no Spec: {len(self._all)} were given, one for each sample.")
        return self._all[sample]

    def require(self, num_samples: int) -> None:
        """Refuse a list of another length.

        Raises:
            SpecError: There are fewer or more Specs than samples.
        """
        if self._is_list and len(self._all) != num_samples:
            raise SpecError(f"{len(self._all)} Specs for {num_samples} prompts: pass one for each, or one for all.")

    def part(self, start: int, stop: int) -> Spec | list[Spec]:
        """Return what was given for some samples."""
        return [self.of(sample) for sample in range(start, stop)] if self._is_list else self._all[0]

    def has(self, spec: Spec) -> Callable[[int], bool]:
        """Return a function that tells of a sample whether it has this Spec, one of these."""
        number = self._numbers[spec]
        return lambda sample: self.is_one or self._number_of[sample] == number


def _listed(given: Any) -> list[Spec]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SpecError(
            f"spec is a vllm_tap.Spec, or a list with one for each prompt, got {type(given).__name__}: try "
            'Spec(hidden_states="all").'
        )
    for number, spec in enumerate(given):
        if not isinstance(spec, Spec):
            raise SpecError(
                f"spec {number} of the list is a {type(spec).__name__}: pass a vllm_tap.Spec for each prompt."
            )
    if not given:
        raise SpecError("the list of Specs is empty: pass one for each prompt, or one for all.")
    return list(given)
