"""The select clause of 2026: which rows of a sequence a capture keeps. Client process.

A clause names rows of the prompt and rows of the generation apart; a phase that it does not name has no rows. Includes
unite, excludes subtract from their union.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import SpecError
from vllm_tap.spec import nearest

PHASES: Final = ("prompt", "generation")
KINDS: Final = ("tokens", "positions", "window")
FIELDS: Final = (
    *PHASES,
    *(f"{phase}_{kind}" for phase in PHASES for kind in KINDS),
    *(f"exclude_{phase}_{kind}" for phase in PHASES for kind in KINDS),
)

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Window = tuple[int, int | None]


class Matchers(NamedTuple):
    """Matches of one side of a clause (include or exclude) in one phase."""

    everything: bool = False
    tokens: tuple[int, ...] | None = None
    positions: tuple[int, ...] | None = None
    window: Window | None = None

    @property
    def given(self) -> bool:
        """True if the clause names the phase on this side."""
        return self != Matchers()

    def match(self, at: IntArray, length: int | None, token_ids: IntArray) -> Mask:
        """Tell which rows [R] of a phase match.

        `at` counts from the start of the phase; `length` is the prompt's, None for a generation, which has no end.
        """
        matched = np.full(len(at), self.everything)
        if self.tokens is not None:
            matched |= np.isin(token_ids, self.tokens)
        if self.positions is not None:
            matched |= np.isin(at, [_place(position, length) for position in self.positions])
        if self.window is not None:
            start, stop = self.window
            matched |= at >= _from_end(start, length) if stop is None else _between(at, start, stop, length)
        return matched


class Select(NamedTuple):
    """A clause, read and checked."""

    include: dict[str, Matchers]
    exclude: dict[str, Matchers]

    def rows(self, positions: IntArray, prompt_len: int, token_ids: IntArray) -> Mask:
        """Tell which rows [R] of one sequence are selected."""
        in_prompt = positions < prompt_len
        chosen = np.zeros(len(positions), np.bool_)
        for phase, member, at, length in (
            ("prompt", in_prompt, positions, prompt_len),
            ("generation", ~in_prompt, positions - prompt_len, None),
        ):
            kept = self.include[phase].match(at, length, token_ids) & ~self.exclude[phase].match(at, length, token_ids)
            chosen |= member & kept
        return chosen


EVERYTHING: Final = Select(
    {phase: Matchers(everything=True) for phase in PHASES}, {phase: Matchers() for phase in PHASES}
)


def read_select(clause: Any) -> Select:
    """Read a clause: a dict or an object with the fields; None selects everything.

    Raises:
        SpecError: An unknown field, a value of the wrong kind, nothing selected, or an exclude in a phase without rows.
    """
    if clause is None:
        return EVERYTHING
    fields = _fields(clause)
    include = {phase: _matchers(fields, phase, "") for phase in PHASES}
    exclude = {phase: _matchers(fields, phase, "exclude_") for phase in PHASES}
    for phase in PHASES:
        if exclude[phase].given and not include[phase].given:
            raise SpecError(f'select excludes rows of the {phase} and includes none: add {phase}="all".')
    if not any(matchers.given for matchers in include.values()):
        raise SpecError('select includes no rows: leave it out for all rows, or give for example prompt="all".')
    return Select(include, exclude)


def covering(clauses: Iterable[Select]) -> str | tuple[int, ...]:
    """Return positions, as `Spec` takes them, among which are all rows of the clauses: the worker writes no others."""
    includes = [clause.include for clause in clauses]
    prompts = [include["prompt"] for include in includes if include["prompt"].given]
    if any(include["generation"].given for include in includes):
        return "all" if prompts else "generated"
    if any(m.everything or m.tokens is not None or m.window is not None for m in prompts):
        return "prompt"
    positions = {position for matchers in prompts for position in matchers.positions or ()}
    # A position past the end of a prompt stands for its last token, which is asked for by -1.
    last = {-1} if any(position >= 0 for position in positions) else set()
    return tuple(sorted(positions | last)) or "prompt"


def _fields(clause: Any) -> dict[str, Any]:
    if isinstance(clause, Mapping):
        for name in clause:
            if name not in FIELDS:
                raise SpecError(f"select has no field {name!r}.{nearest(str(name), FIELDS)}")
        return {name: clause.get(name) for name in FIELDS}
    found = {name: getattr(clause, name, None) for name in FIELDS}
    if not any(hasattr(clause, name) for name in FIELDS):
        raise SpecError(f"select is a dict or an object with fields such as prompt, got {type(clause).__name__}.")
    return found


def _matchers(fields: Mapping[str, Any], phase: str, prefix: str) -> Matchers:
    everything = None if prefix else fields[phase]
    if everything not in (None, "all"):
        raise SpecError(f'select: {phase} is "all" or left out, got {everything!r}.')
    name = f"{prefix}{phase}"
    negative = phase == "prompt"
    return Matchers(
        everything == "all",
        _numbers(f"{name}_tokens", fields[f"{name}_tokens"], negative=False),
        _numbers(f"{name}_positions", fields[f"{name}_positions"], negative=negative),
        _window(f"{name}_window", fields[f"{name}_window"], negative=negative),
    )


def _numbers(name: str, values: Any, *, negative: bool) -> tuple[int, ...] | None:
    if values is None:
        return None
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise SpecError(f"select: {name} is a list of numbers, got {values!r}.")
    return tuple(_number(name, value, negative) for value in values)


def _window(name: str, bounds: Any, *, negative: bool) -> Window | None:
    if bounds is None:
        return None
    if isinstance(bounds, str) or not isinstance(bounds, Sequence) or len(bounds) != 2:
        raise SpecError(f"select: {name} is (start, stop), stop not included and None for the end, got {bounds!r}.")
    start, stop = bounds
    return _number(name, start, negative), None if stop is None else _number(name, stop, negative)


def _number(name: str, value: Any, negative: bool) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise SpecError(f"select: {name} takes whole numbers, got {value!r}.")
    number = int(value.__index__())
    if number < 0 and not negative:
        raise SpecError(f"select: {name} takes numbers of 0 or more, got {number}.")
    return number


def _place(position: int, length: int | None) -> int:
    if length is not None and position >= length:
        warnings.warn(
            f"select: position {position} is past the end of a prompt of {length} tokens: its last one is taken",
            stacklevel=2,
        )
        return length - 1
    return _from_end(position, length)


def _between(at: IntArray, start: int, stop: int, length: int | None) -> Mask:
    return (at >= _from_end(start, length)) & (at < _from_end(stop, length))


def _from_end(position: int, length: int | None) -> int:
    return position if position >= 0 or length is None else position + length
