"""Verifies a dataset: every byte against its checksum, and what its files say of one another. In any process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import numpy as np

from vllm_tap.errors import DatasetDamagedError, DatasetError
from vllm_tap.store import facts as facts_file
from vllm_tap.store import manifest
from vllm_tap.store.checksum import crc32
from vllm_tap.store.part import Part
from vllm_tap.store.place import Place, part_name
from vllm_tap.store.places import place_of

CHUNK_BYTES: Final = 16 << 20


class Verification(NamedTuple):
    """Result of a verification.

    Attributes:
        num_parts: Sealed parts.
        num_rows: Rows of each layer.
        num_bytes: Bytes that were read.
        problems: What is wrong, a line for each; empty if all is well.
        unsealed: Folders of parts without a manifest, which readers leave out.
    """

    num_parts: int
    num_rows: int
    num_bytes: int
    problems: list[str]
    unsealed: list[str]


def verify(path: Any, on_bytes: Callable[[int], None] = lambda nbytes: None) -> Verification:
    """Read every byte of a dataset and compare it with its checksum, labels with the index, parts with one another.

    Args:
        path: A folder, or a URL that fsspec knows.
        on_bytes: Called with the number of bytes behind each piece that was read.

    Raises:
        DatasetError: There is no part at all.

    Cost:
        One pass over all files.
    """
    place = place_of(path)
    names = place.parts()
    if not names:
        raise DatasetError(f"{place.path} holds no part of a dataset.", path=place.path)
    problems: list[str] = []
    unsealed, parts = [], []
    for name in names:
        try:
            data = place.read(f"{name}/{manifest.NAME}", manifest.MAX_BYTES)
            if data is None:
                unsealed.append(name)
                continue
            parts.append(Part(place, name, manifest.decode(data, f"{place.path}/{name}/{manifest.NAME}")))
        except DatasetError as error:
            problems.append(str(error))
    for part in parts:
        problems += _problems(place, part, on_bytes)
    problems += _between(parts)
    num_bytes = sum(file.nbytes for part in parts for file in part.manifest.files)
    return Verification(len(parts), sum(part.manifest.num_rows for part in parts), num_bytes, problems, unsealed)


def _problems(place: Place, part: Part, on_bytes: Callable[[int], None]) -> Iterator[str]:
    if part.name != part_name(part.manifest.first_sample):
        yield f"{part.path('')} is the part that begins with sample {part.manifest.first_sample}"
    for file in part.manifest.files:
        try:
            found = _checksum(place, f"{part.name}/{file.name}", file.nbytes, on_bytes)
            if found != file.crc32:
                yield f"{part.path(file.name)} has another checksum than its manifest states"
        except DatasetError as error:
            yield str(error)
    try:
        facts = part.facts()
        for stream in facts.streams:
            for layer in stream.layers:
                part.rows(stream, layer, 0, 0)
        _compare_labels(part)
    except DatasetError as error:
        yield str(error)


def _checksum(place: Place, name: str, nbytes: int, on_bytes: Callable[[int], None]) -> int:
    size = place.size(name)
    if size != nbytes:
        found = "is missing" if size is None else f"has {size} bytes, its manifest states {nbytes}"
        raise DatasetDamagedError(f"{place.path}/{name} {found}")
    total = 0
    for start in range(0, nbytes, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, nbytes)
        total = crc32(place.bytes(name, start, stop).data, total)
        on_bytes(stop - start)
    return total


def _compare_labels(part: Part) -> None:
    """Compare the labels with the index, column by column."""
    labels, table = part.labels, part.table()
    path = part.path(manifest.INDEX_NAME)
    flat: dict[str, Any] = {
        "sample": labels.samples,
        "completion": labels.completions,
        "row_start": labels.starts[:-1],
        "row_stop": labels.starts[1:],
        "positions": labels.positions,
        "token_ids": labels.token_ids,
    }
    for name, expected in flat.items():
        column = table[name].combine_chunks()
        values = column.flatten() if name in ("positions", "token_ids") else column
        if not np.array_equal(values.to_numpy(zero_copy_only=False), expected):
            raise DatasetDamagedError(f"{path}: {name} is not what {manifest.LABELS_NAME} says", path=path)


def _between(parts: list[Part]) -> Iterator[str]:
    ordered = sorted(parts, key=lambda part: part.manifest.first_sample)
    for one, other in itertools.pairwise(ordered):
        if one.manifest.first_sample + one.manifest.num_samples > other.manifest.first_sample:
            yield f"{one.name} and {other.name} hold the same samples"
    known: dict[str, Any] = {}
    for part in ordered:
        try:
            known.setdefault(part.manifest.facts, (part, part.facts()))
        except DatasetError:
            continue  # it is among the problems of the part
    for part, facts in list(known.values())[1:]:
        first = next(iter(known.values()))[1]
        try:
            facts_file.require_same(first, facts, part.path(""))
        except DatasetError as error:
            yield str(error)
