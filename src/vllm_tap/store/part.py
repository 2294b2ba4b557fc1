"""One sealed part as a reader sees it: shards, labels and index, each checked before it is used. In any process."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING

import numpy as np

from vllm_tap.errors import DatasetDamagedError
from vllm_tap.store import facts as facts_file
from vllm_tap.store import index, manifest, shard
from vllm_tap.store.dtypes import Bytes, dtype_of
from vllm_tap.store.facts import Facts, StreamFacts
from vllm_tap.store.manifest import FileFacts, Manifest
from vllm_tap.store.place import Place, part_name
from vllm_tap.store.source import Labels

if TYPE_CHECKING:
    import pyarrow as pa


class Part:
    """A sealed part.

    Attributes:
        name: Its folder.
        manifest: What it says of itself.
    """

    def __init__(self, place: Place, name: str, stated: Manifest) -> None:
        self.name, self.manifest = name, stated
        self._place = place
        self._known: set[str] = set()

    def path(self, name: str) -> str:
        """Return where a file lies, for messages."""
        return f"{self._place.path}/{self.name}/{name}"

    def facts(self) -> Facts:
        """Read the facts of this part.

        Raises:
            DatasetDamagedError: They are missing, or others than the manifest states.
        """
        data = self._place.read(f"{self.name}/{manifest.FACTS_NAME}", manifest.MAX_BYTES)
        path = self.path(manifest.FACTS_NAME)
        if data is None or facts_file.digest(data) != self.manifest.facts:
            raise DatasetDamagedError(f"{path} is {'missing' if data is None else 'not what was sealed'}", path=path)
        return facts_file.decode(data, path)

    def rows(self, stream: StreamFacts, layer: int, start: int, stop: int) -> Bytes:
        """Return the bytes of rows `start` to `stop` of a shard; `0 <= start <= stop <= num_rows`.

        Raises:
            DatasetDamagedError: The file is missing, has another length, or does not begin as it must.
        """
        name = shard.shard_name(stream.name, layer)
        head = len(self._head(stream, layer)) if name in self._known else self._checked(name, stream, layer)
        return self._bytes(name, head + start * stream.row_bytes, head + stop * stream.row_bytes)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (a part lives as long as its dataset)
    def _head(self, stream: StreamFacts, layer: int) -> bytes:
        return shard.shard_header(stream, layer, self.manifest.num_rows)

    def _checked(self, name: str, stream: StreamFacts, layer: int) -> int:
        head = self._head(stream, layer)
        self._check_file(name, head, self.manifest.num_rows * stream.row_bytes)
        self._known.add(name)
        return len(head)

    def _check_file(self, name: str, head: bytes, nbytes: int) -> FileFacts:
        """Compare what is there with what the manifest and the header must say."""
        path, stated = self.path(name), self.manifest.file(name)
        if stated is None:
            raise DatasetDamagedError(f"{path} is not in the manifest", path=path)
        size = self._place.size(f"{self.name}/{name}")
        if size is None:
            raise DatasetDamagedError(f"{path} is missing", path=path)
        if not size == stated.nbytes == len(head) + nbytes:
            expected = f"{len(head) + nbytes} (the manifest says {stated.nbytes})"
            raise DatasetDamagedError(f"{path} has {size} bytes, expected are {expected}", path=path)
        if self._bytes(name, 0, len(head)).tobytes() != head:
            raise DatasetDamagedError(f"{path} does not begin with the header that its part calls for", path=path)
        return stated

    def _bytes(self, name: str, start: int, stop: int) -> Bytes:
        return self._place.bytes(f"{self.name}/{name}", start, stop)

    @functools.cached_property
    def labels(self) -> Labels:
        """The labels of all rows, mapped.

        Raises:
            DatasetDamagedError: They are not what a part of this size has, or contradict it.
        """
        stated = self.manifest
        sizes = stated.num_sequences, stated.num_rows
        arrays = shard.label_arrays(*sizes)
        head = shard.label_header(*sizes)
        nbytes = sum(array.nbytes for array in arrays.values())
        self._check_file(manifest.LABELS_NAME, head, nbytes)
        data = self._bytes(manifest.LABELS_NAME, len(head), len(head) + nbytes)
        found, start = {}, 0
        for name, array in arrays.items():
            stop = start + array.nbytes
            found[name] = data[start:stop].view(dtype_of(array.dtype).numpy)
            start = stop
        labels = Labels(**found)
        self._check_labels(labels)
        return labels

    def _check_labels(self, labels: Labels) -> None:
        starts, samples, path = labels.starts, labels.samples, self.path(manifest.LABELS_NAME)
        if starts[0] != 0 or starts[-1] != self.manifest.num_rows or (np.diff(starts) < 0).any():
            raise DatasetDamagedError(f"{path}: sequences do not follow one another", path=path)
        first, stop = self.manifest.first_sample, self.manifest.first_sample + self.manifest.num_samples
        if len(samples) and (samples[0] < first or samples[-1] >= stop or (np.diff(samples) < 0).any()):
            raise DatasetDamagedError(f"{path}: samples are not {first} to {stop - 1} in order", path=path)

    def table(self) -> pa.Table:
        """Read the index.

        Raises:
            DatasetDamagedError: It is not the one that was sealed.
        """
        stated = self.manifest.file(manifest.INDEX_NAME)
        path = self.path(manifest.INDEX_NAME)
        size = self._place.size(f"{self.name}/{manifest.INDEX_NAME}")
        if stated is None or size != stated.nbytes:
            raise DatasetDamagedError(f"{path} is missing, or has another length than its manifest states", path=path)
        return index.decode(self._bytes(manifest.INDEX_NAME, 0, size), stated, self.manifest.num_sequences, path)


def sealed_parts(place: Place) -> list[Part]:
    """Return all parts that have a manifest, in order of their samples.

    Raises:
        DatasetDamagedError: A manifest is damaged, or two parts hold the same sample.
    """
    parts = []
    for name in place.parts():
        data = place.read(f"{name}/{manifest.NAME}", manifest.MAX_BYTES)
        if data is not None:
            parts.append(Part(place, name, _decoded(data, name, f"{place.path}/{name}/{manifest.NAME}")))
    parts.sort(key=lambda part: part.manifest.first_sample)
    for one, other in itertools.pairwise(parts):
        if one.manifest.first_sample + one.manifest.num_samples > other.manifest.first_sample:
            raise DatasetDamagedError(
                f"{place.path}: {one.name} and {other.name} hold the same samples: move one of them away",
                path=f"{place.path}/{other.name}",
            )
    return parts


def _decoded(data: bytes, name: str, path: str) -> Manifest:
    stated = manifest.decode(data, path)
    if name != part_name(stated.first_sample):
        raise DatasetDamagedError(f"{path} is of the part that begins with sample {stated.first_sample}", path=path)
    return stated
