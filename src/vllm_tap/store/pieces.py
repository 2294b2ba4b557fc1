"""Cuts prompts into pieces of a part each, leaving out what is sealed. In the process that writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from vllm_tap.errors import DatasetError, SpecError
from vllm_tap.store.manifest import Manifest

Metadata = Mapping[str, Any] | None


class Piece(NamedTuple):
    """Prompts of one part.

    Attributes:
        first: Number of the first sample.
        prompts: Prompts, in order.
        metadata: The user's, one for each prompt; None if there are none at all.
        digest: Digest of both.
    """

    first: int
    prompts: list[Any]
    metadata: list[Metadata] | None
    digest: str


@dataclass(frozen=True, slots=True)
class Share:
    """Which of the pieces of `batch` prompts this process records: every `count`-th from `index` on."""

    index: int = 0
    count: int = 1

    def checked(self) -> Share:
        """Return this share.

        Raises:
            SpecError: There is no such share.
        """
        if not 0 <= self.index < self.count:
            raise SpecError(f"share=({self.index}, {self.count}): the first number counts from 0 below the second.")
        return self


def pieces(
    prompts: Iterable[Any],
    metadata: Iterable[Metadata] | None,
    sealed: Sequence[Manifest],
    batch: int,
    share: Share = Share(),
) -> Iterator[Piece]:
    """Return what is left to record, piece by piece; nothing is read ahead of a piece.

    Raises:
        DatasetError: A sealed part was written from other prompts than these, or from more.
        SpecError: Prompts and metadata are not as many.
    """
    left = _Sealed(sealed)
    held: list[tuple[Any, Metadata]] = []
    number = -1
    for number, pair in enumerate(_pairs(prompts, metadata)):
        is_mine = (number // batch) % share.count == share.index
        if held and (number % batch == 0 or left.holds(number)):
            yield _piece(number - len(held), held, metadata)
            held = []
        if left.holds(number):
            left.pass_by(pair)
        elif is_mine:
            held.append(pair)
    if held:
        yield _piece(number + 1 - len(held), held, metadata)
    left.end(number + 1)


def _pairs(prompts: Iterable[Any], metadata: Iterable[Metadata] | None) -> Iterator[tuple[Any, Metadata]]:
    if metadata is None:
        yield from ((prompt, None) for prompt in prompts)
        return
    try:
        yield from zip(prompts, metadata, strict=True)
    except ValueError as error:
        if "zip() argument" not in str(error):
            raise
        raise SpecError(f"prompts and metadata are not as many: {error}") from error


def _piece(first: int, held: list[tuple[Any, Metadata]], metadata: Any) -> Piece:
    prompts, given = [prompt for prompt, _ in held], [one for _, one in held]
    return Piece(first, prompts, given if metadata is not None else None, _digest(held))


class _Sealed:
    """Sealed parts, passed by in order of their samples; prompts are compared with their digests."""

    def __init__(self, sealed: Sequence[Manifest]) -> None:
        self._left = sorted(sealed, key=lambda part: part.first_sample, reverse=True)
        self._hash = hashlib.sha256()
        self._num_passed = 0

    def holds(self, number: int) -> bool:
        """Tell whether a sample, none of which lies before those that were passed by, is sealed."""
        while self._left and not self._left[-1].num_samples:
            self._left.pop()
        return bool(self._left) and self._left[-1].first_sample <= number

    def pass_by(self, pair: tuple[Any, Metadata]) -> None:
        """Take the next prompt of the part."""
        part = self._left[-1]
        self._hash.update(_bytes(pair))
        self._num_passed += 1
        if self._num_passed == part.num_samples:
            if part.prompts and part.prompts != self._hash.hexdigest():
                last = part.first_sample + part.num_samples - 1
                raise DatasetError(
                    f"samples {part.first_sample} to {last} were recorded from other prompts or metadata than these: "
                    "pass the same ones in the same order, or record into another folder."
                )
            self._left.pop()
            self._hash, self._num_passed = hashlib.sha256(), 0

    def end(self, num_prompts: int) -> None:
        """Refuse to end before the last sealed sample has been passed by."""
        if self._left:
            stop = self._left[0].first_sample + self._left[0].num_samples
            raise DatasetError(f"the dataset holds samples up to {stop - 1}, and there are {num_prompts} prompts only.")


def _digest(pairs: Iterable[tuple[Any, Metadata]]) -> str:
    sha = hashlib.sha256()
    for pair in pairs:
        sha.update(_bytes(pair))
    return sha.hexdigest()


def _bytes(pair: tuple[Any, Metadata]) -> bytes:
    """Return what stands for a prompt; of what JSON does not hold, such as an image, its type alone."""

    def stated(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else f"<{type(value).__name__}>"

    return msgspec.json.encode(pair, enc_hook=stated, order="sorted") + b"\n"
