"""Positions of a sequence that a capture takes: windows, masks, tokens, and what can be made of them by `|`, `&`, `-`.

Used by the client, for whole sequences, and by workers, once per step. A worker knows neither how many tokens will be
generated nor, ahead of the device, which: there an expression has two bounds. Rows between them are taken, and the
client, which knows all, drops what was not asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import SpecError

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

MAX_DEPTH: Final = 32
"""Operations within one another: an expression may come from outside."""

NEVER: Final = 2**31 - 1
"""A position that no sequence has."""


class Tokens(NamedTuple):
    """Tokens of sequences, element by element: arrays [T].

    Attributes:
        position: Of each token in its sequence.
        prompt_len: Of the sequence that it belongs to.
        length: Tokens of that sequence that enter the model; None while it is generated.
        token_id: None where it is not known.
    """

    position: Ints
    prompt_len: Ints
    length: Ints | None = None
    token_id: npt.NDArray[np.integer[Any]] | None = None


class Bounds(NamedTuple):
    """Tokens that are certainly asked for, and those that may be: bool [T] each, the first within the second."""

    certain: Bools
    possible: Bools


class Begin(NamedTuple):
    """A lower bound of the positions that an expression takes, for prompts of any length.

    Attributes:
        from_start: Counted from the start of the prompt; `NEVER` if only its end says where positions begin.
        from_end: Tokens before the end of the prompt; 0 for its end itself, negative if only `from_start` counts.
    """

    from_start: int
    from_end: int

    def of(self, prompt_len: int) -> int:
        """Return the bound for a prompt of this length: no position before it is taken."""
        from_end = prompt_len if self.from_end < 0 else max(prompt_len - self.from_end, 0)
        return min(self.from_start, from_end)

    @property
    def is_last_or_later(self) -> bool:
        """True if nothing before the last position of any prompt is taken."""
        return self.from_start == NEVER and self.from_end <= 1


class Positions:
    """A choice of positions of a sequence. Immutable, comparable, and the same after a trip through JSON.

    Build one from `prompt`, `generated`, `tokens`, `mask` and `at`; `a | b` takes the positions of both, `a & b` those
    in both, `a - b` those of `a` that are not in `b`. Like a slice, it chooses among the positions that there are: in
    a sequence it may find none.
    """

    __slots__ = ("_form",)
    _form: tuple[Any, ...]

    def __init__(self, form: tuple[Any, ...]) -> None:
        object.__setattr__(self, "_form", form)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("Positions cannot be changed: build another one")

    # ------------------------------------------------------------------------------------------------- how one is made

    @classmethod
    def prompt(cls, start: int | None = None, stop: int | None = None, step: int | None = None) -> Positions:
        """Take positions of the prompt, chosen as by a slice; negative numbers count from its end."""
        return cls(("prompt", *_slice("prompt", start, stop, step)))

    @classmethod
    def generated(cls, start: int | None = None, stop: int | None = None, step: int | None = None) -> Positions:
        """Take generated tokens that enter the model (all but the last), chosen as by a slice.

        Negative numbers count from the last of them. As no worker knows which that will be, it writes all rows that
        could be meant.
        """
        return cls(("generated", *_slice("generated", start, stop, step)))

    @classmethod
    def tokens(cls, token_ids: Iterable[int]) -> Positions:
        """Take positions whose token is one of these.

        Workers write the rows of every position for it that the rest of the expression allows: narrow it with `&`.
        """
        try:
            ids = tuple(sorted({_whole("tokens", token) for token in token_ids}))
        except TypeError:
            raise SpecError(f"Positions.tokens takes a list of token ids, got {token_ids!r}.") from None
        if not ids or ids[0] < 0:
            raise SpecError(f"Positions.tokens takes token ids, which are not negative, got {list(ids)}.")
        return cls(("tokens", *ids))

    @classmethod
    def mask(cls, booleans: Iterable[bool]) -> Positions:
        """Take the prompt positions where a list of booleans is true: one for each position, false behind its end."""
        given = list(booleans)
        values = np.asarray(given) if given else np.empty(0, np.bool_)
        if values.ndim != 1 or values.dtype != np.bool_:
            raise SpecError(f"Positions.mask takes a list of booleans, got {values.dtype} of shape {values.shape}.")
        return cls(("mask", *_runs(values)))

    @classmethod
    def at(cls, positions: Iterable[int]) -> Positions:
        """Take positions of the prompt by number; negative ones count from its end."""
        try:
            return cls(("at", *sorted({_whole("at", position) for position in positions})))
        except TypeError:
            raise SpecError(f"Positions.at takes a list of prompt positions, got {positions!r}.") from None

    def __or__(self, other: Positions) -> Positions:
        return _joined("or", self, other) if isinstance(other, Positions) else NotImplemented

    def __and__(self, other: Positions) -> Positions:
        return _joined("and", self, other) if isinstance(other, Positions) else NotImplemented

    def __sub__(self, other: Positions) -> Positions:
        return _joined("sub", self, other) if isinstance(other, Positions) else NotImplemented

    # ------------------------------------------------------------------------------------------------- what it chooses

    def choose(self, tokens: Tokens) -> Bools:
        """Tell which tokens of whole sequences are asked for.

        Args:
            tokens: With lengths and token ids.

        Returns:
            bool [T].
        """
        assert tokens.length is not None
        assert tokens.token_id is not None
        return _bounds(self._form, tokens).certain

    def bounds(self, tokens: Tokens) -> Bounds:
        """Tell which tokens are asked for as far as that is known; see `Bounds`.

        Cost: some numpy calls for each leaf of the expression, of arrays [T].
        """
        return _bounds(self._form, tokens)

    @property
    def begin(self) -> Begin:
        """A lower bound of what is taken; see `Begin`. Whatever lies before it need not go through the model."""
        return _begin(self._form)

    @property
    def takes_generated(self) -> bool:
        """True if generated tokens may be among what is taken."""
        return _takes_generated(self._form)

    @property
    def needs_end(self) -> bool:
        """True if what is taken of the tokens so far may change with those that are still to come."""
        return _needs_end(self._form)

    # --------------------------------------------------------------------------------------------------------- as JSON

    def to_plain(self) -> dict[str, Any]:
        """Return lists and numbers that JSON can hold; `from_plain` gives an equal expression back."""
        return _to_plain(self._form)

    @classmethod
    def from_plain(cls, plain: object) -> Positions:
        """Build an expression from what `to_plain` returned.

        Raises:
            SpecError: It is something else.
        """
        return _from_plain(plain, 0)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Positions) and self._form == other._form

    def __hash__(self) -> int:
        return hash(self._form)

    def __reduce__(self) -> Any:
        return Positions, (self._form,)

    def __repr__(self) -> str:
        return _text(self._form)


def _joined(name: str, a: Positions, b: Positions) -> Positions:
    """Return an operation on two expressions; a chain of the same one is no deeper than its parts."""
    parts = (*a._form[1:], b._form) if a._form[0] == name else (a._form, b._form)
    form = (name, *parts)
    if _depth(form) > MAX_DEPTH:
        raise SpecError(f"positions: at most {MAX_DEPTH} operations within one another: write chains, `a | b | c`.")
    return Positions(form)


def _depth(form: tuple[Any, ...]) -> int:
    return 1 + max(map(_depth, form[1:])) if form[0] in _OPERATIONS else 0


def _slice(name: str, *bounds: int | None) -> tuple[int | None, ...]:
    numbers = tuple(None if bound is None else _whole(name, bound) for bound in bounds)
    if numbers[2] is not None and numbers[2] < 1:
        raise SpecError(f"Positions.{name}(step={numbers[2]}): a step is at least 1.")
    return numbers


def _whole(name: str, number: Any) -> int:
    whole = number.item() if isinstance(number, np.integer) else number
    if type(whole) is not int or abs(whole) > 2**31 - 1:
        raise SpecError(f"Positions.{name} takes whole numbers, got {number!r}.")
    return whole


def _runs(values: Bools) -> tuple[int, ...]:
    """Return the lengths of runs, of which the first is of false ones; none for a trailing run of false ones."""
    edges = np.flatnonzero(np.diff(values, prepend=False, append=False))
    return tuple(np.diff(edges, prepend=0).tolist())


def _bounds(form: tuple[Any, ...], tokens: Tokens) -> Bounds:
    name, *rest = form
    if name in _OPERATIONS:
        return functools.reduce(_OPERATIONS[name], (_bounds(part, tokens) for part in rest))
    bounds: Bounds = _LEAVES[name](tokens, *rest)
    return bounds


def _either(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.certain | b.certain, a.possible | b.possible)


def _both(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.certain & b.certain, a.possible & b.possible)


def _without(a: Bounds, b: Bounds) -> Bounds:
    return Bounds(a.certain & ~b.possible, a.possible & ~b.certain)


def _exactly(chosen: Bools) -> Bounds:
    return Bounds(chosen, chosen)


def _in_prompt(tokens: Tokens, start: int | None, stop: int | None, step: int | None) -> Bounds:
    chosen = _in_slice(tokens.position, tokens.prompt_len, start, stop, step)
    return _exactly(chosen & (tokens.position < tokens.prompt_len))


def _in_generated(tokens: Tokens, start: int | None, stop: int | None, step: int | None) -> Bounds:
    index = tokens.position - tokens.prompt_len
    is_generated = index >= 0
    if tokens.length is not None:
        return _exactly(is_generated & _in_slice(index, tokens.length - tokens.prompt_len, start, stop, step))
    ends_open = (start is None or start >= 0) and (stop is None or stop >= 0)
    if ends_open:
        unbounded = np.full_like(index, np.iinfo(np.int64).max // 2)
        return _exactly(is_generated & _in_slice(index, unbounded, start, stop, step))
    # From the end, which is not known: all that come not before the start, and not at or behind the stop.
    possible = is_generated
    if start is not None and start >= 0:
        possible = possible & (index >= start) & ((index - start) % (step or 1) == 0)
    if stop is not None and stop >= 0:
        possible = possible & (index < stop)
    return Bounds(np.zeros_like(possible), possible)


def _in_slice(index: Ints, length: Ints, start: int | None, stop: int | None, step: int | None) -> Bools:
    """Tell which indices a slice of sequences of these lengths has; as `range(length)[start:stop:step]`."""
    first = np.zeros_like(length) if start is None else _from_end(start, length)
    end = length if stop is None else _from_end(stop, length)
    chosen: Bools = (index >= first) & (index < end)
    return chosen if step in (None, 1) else chosen & ((index - first) % step == 0)


def _from_end(number: int, length: Ints) -> Ints:
    return np.maximum(length + number, 0) if number < 0 else np.full_like(length, number)


def _of_tokens(tokens: Tokens, *token_ids: int) -> Bounds:
    if tokens.token_id is None:
        unknown = np.zeros(len(tokens.position), np.bool_)
        return Bounds(unknown, ~unknown)
    return _exactly(np.isin(tokens.token_id, token_ids))


def _in_mask(tokens: Tokens, *runs: int) -> Bounds:
    # A position lies in a run of true ones if an odd number of runs ends at or before it.
    number = np.searchsorted(np.cumsum(runs), tokens.position, "right")
    return _exactly((number % 2 == 1) & (tokens.position < tokens.prompt_len))


def _at(tokens: Tokens, *positions: int) -> Bounds:
    found = np.isin(tokens.position, positions) | np.isin(tokens.position - tokens.prompt_len, positions)
    return _exactly(found & (tokens.position < tokens.prompt_len))


def _begin(form: tuple[Any, ...]) -> Begin:
    name, *rest = form
    if name == "or":
        parts = [_begin(part) for part in rest]
        return Begin(min(part.from_start for part in parts), max(part.from_end for part in parts))
    if name == "and":
        # The bound of each part holds; no one pair of numbers says the larger of two.
        return max((_begin(part) for part in rest), key=lambda part: (part.from_start, -part.from_end))
    if name == "sub":
        return _begin(rest[0])
    if name == "generated":
        return Begin(NEVER, 0)
    if name == "tokens":
        return Begin(0, -1)
    if name == "mask":
        return Begin(rest[0] if rest else NEVER, -1)
    numbers = [rest[0] or 0] if name == "prompt" else rest
    from_start = min((number for number in numbers if number >= 0), default=NEVER)
    return Begin(from_start, max((-number for number in numbers if number < 0), default=-1))


def _takes_generated(form: tuple[Any, ...]) -> bool:
    name, *rest = form
    if name == "sub":
        return _takes_generated(rest[0])
    if name in _OPERATIONS:
        return {"or": any, "and": all}[name](map(_takes_generated, rest))
    return name in ("generated", "tokens")


def _needs_end(form: tuple[Any, ...]) -> bool:
    name, *rest = form
    if name in _OPERATIONS:
        return any(map(_needs_end, rest))
    return name == "generated" and any(bound is not None and bound < 0 for bound in rest)


_OPERATIONS: Final = {"or": _either, "and": _both, "sub": _without}
_LEAVES: Final[dict[str, Any]] = {
    "prompt": _in_prompt,
    "generated": _in_generated,
    "tokens": _of_tokens,
    "mask": _in_mask,
    "at": _at,
}
_SIGNS: Final = {"or": "|", "and": "&", "sub": "-"}


def _to_plain(form: tuple[Any, ...]) -> dict[str, Any]:
    name, *rest = form
    return {name: [_to_plain(part) for part in rest] if name in _OPERATIONS else rest}


def _from_plain(plain: object, depth: int) -> Positions:
    if not isinstance(plain, Mapping) or len(plain) != 1:
        raise SpecError(
            f'positions in JSON are an object of one entry such as {{"prompt": [-8, null, 1]}}, got {plain!r}.'
        )
    ((name, rest),) = plain.items()
    if not isinstance(rest, list | tuple) or name not in (*_OPERATIONS, *_LEAVES):
        raise SpecError(f"positions have no {name!r} of {rest!r}. Known: {', '.join((*_LEAVES, *_OPERATIONS))}.")
    if name in _OPERATIONS:
        if len(rest) < 2 or depth >= MAX_DEPTH:
            raise SpecError(
                f"positions: {name!r} takes two expressions or more, at most {MAX_DEPTH} within one another."
            )
        return Positions((name, *(_from_plain(part, depth + 1)._form for part in rest)))
    if name in ("prompt", "generated"):
        if len(rest) > 3:
            raise SpecError(f"positions: {name!r} takes start, stop and step, got {rest!r}.")
        return Positions((name, *_slice(name, *rest, *[None] * (3 - len(rest)))))
    if name == "mask":
        runs = tuple(_whole(name, run) for run in rest)
        if any(run < 0 for run in runs):
            raise SpecError(f"positions: the runs of a mask are not negative, got {rest!r}.")
        return Positions((name, *runs))
    return Positions.tokens(rest) if name == "tokens" else Positions.at(rest)


def _text(form: tuple[Any, ...]) -> str:
    name, *rest = form
    if name in _OPERATIONS:
        return f"({f' {_SIGNS[name]} '.join(map(_text, rest))})"
    if name in ("prompt", "generated"):
        while rest and rest[-1] is None:
            rest.pop()
        return f"Positions.{name}({', '.join(map(str, rest))})"
    if name == "mask":
        return f"Positions.mask(<{sum(rest[1::2])} positions>)"
    return f"Positions.{name}({rest})"
