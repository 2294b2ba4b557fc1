"""`open_dataset`: recorded rows as a sequence of samples, and as arrays over all of them. In any process."""

from __future__ import annotations

import functools
import itertools
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import DatasetError, LayerError, RowsMissingError, SpecError
from vllm_tap.spec import Spec
from vllm_tap.store.facts import Facts, require_same
from vllm_tap.store.index import IndexRow, rows_of
from vllm_tap.store.part import Part, sealed_parts
from vllm_tap.store.place import Place
from vllm_tap.store.places import place_of
from vllm_tap.store.rows import Rows
from vllm_tap.store.sample import Sample
from vllm_tap.streams import not_of_samples

if TYPE_CHECKING:
    import pyarrow as pa

    from vllm_tap.store.loader import Batches

MAX_TABLES: Final = 64
"""Indexes of parts that are kept once they have been read."""


def open_dataset(path: Any) -> Dataset:
    """Open a dataset. Neither vLLM nor a GPU is needed; rows are read when they are asked for.

    Args:
        path: A folder, or a URL that fsspec knows.

    Returns:
        Dataset: the samples of all parts that are sealed now. It can be pickled: the copy opens the folder again.

    Raises:
        DatasetError: There is no sealed part, or parts of different runs.
        DatasetDamagedError: A manifest does not validate.
    """
    return Dataset(place_of(path))


class Dataset(Sequence[Sample]):
    """Recorded samples, in the order of their numbers.

    Attributes:
        path: Where it lies.
        facts: Facts that hold for all rows: model, streams, conventions, routing, versions.
        num_rows: Rows of each layer, over all samples and completions.
    """

    def __init__(self, place: Place) -> None:
        self.path = place.path
        self._parts = sealed_parts(place)
        if not self._parts:
            raise DatasetError(
                f"{self.path} holds no sealed part of a dataset: give the folder that record, DatasetWriter or "
                "Capture.save wrote.",
                path=self.path,
            )
        self.facts = _common_facts(self._parts)
        stated = [part.manifest for part in self._parts]
        self._firsts = [one.first_sample for one in stated]
        self._sample_starts = list(itertools.accumulate((one.num_samples for one in stated), initial=0))
        self._row_starts = list(itertools.accumulate((one.num_rows for one in stated), initial=0))
        self.num_rows = self._row_starts[-1]
        self._views: dict[tuple[str, int], Rows] = {}
        self._table = functools.lru_cache(MAX_TABLES)(lambda number: self._parts[number].table())

    def __reduce__(self) -> tuple[Callable[[Any], Dataset], tuple[str]]:
        return open_dataset, (self.path,)

    if not TYPE_CHECKING:  # names that are not there stay unknown to type checkers

        def __getattr__(self, name: str) -> Any:
            raise not_of_samples(self, name)

    @functools.cached_property
    def spec(self) -> Spec:
        """The specification that was asked for."""
        return Spec.from_json(self.facts.spec)

    @functools.cached_property
    def layers(self) -> dict[str, list[int]]:
        """{stream: layers recorded, ascending}."""
        return self.facts.layers

    @property
    def conventions(self) -> dict[str, str]:
        """{stream: where its rows come from}."""
        return self.facts.conventions

    @property
    def routing(self) -> dict[int, Any]:
        """{layer: how its router chooses experts by their logits}; see `Capture.routing`."""
        return self.facts.routing

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model."""
        return self.facts.num_layers

    @property
    def has_final_norm(self) -> bool:
        """True if the model has a norm behind its last layer."""
        return self.facts.has_final_norm

    @property
    def parts(self) -> Sequence[Part]:
        """The sealed parts, in order."""
        return self._parts

    @property
    def num_bytes(self) -> int:
        """Bytes of all files that the manifests name."""
        return sum(file.nbytes for part in self._parts for file in part.manifest.files)

    def __len__(self) -> int:
        return self._sample_starts[-1]

    def __getitem__(self, index: Any) -> Any:
        """Return a sample by its place in the dataset; of several completions the first (see `sample`)."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self.sample(index)

    def sample(self, index: int, completion: int = 0) -> Sample:
        """Return the rows of one completion of a sample; negative numbers count from the last sample.

        Raises:
            IndexError: There is no such sample.
            RowsMissingError: There is no such completion.
        """
        place = operator.index(index)
        place = place + len(self) if place < 0 else place
        if not 0 <= place < len(self):
            raise IndexError(f"sample {index} of a dataset of {len(self)}")
        number = bisect_right(self._sample_starts, place) - 1
        part = self._parts[number]
        sample = part.manifest.first_sample + place - self._sample_starts[number]
        found = self._find(part, sample, completion)
        if found is None:
            raise RowsMissingError(f"sample {index} of {len(self)} has no completion {completion}", sample=index)
        return self._of(number, found)

    @staticmethod
    def _find(part: Part, sample: int, completion: int) -> int | None:
        labels = part.labels
        first, last = np.searchsorted(labels.samples, [sample, sample + 1])
        at = np.flatnonzero(labels.completions[first:last] == completion)
        return int(first + at[0]) if len(at) else None

    def _of(self, number: int, sequence: int) -> Sample:
        labels, base = self._parts[number].labels, self._row_starts[number]
        start, stop = labels.starts[sequence : sequence + 2].tolist()
        key = int(labels.samples[sequence]), int(labels.completions[sequence])
        return Sample(self, *key, base + start, base + stop)

    def sequences(self) -> Iterator[Sample]:
        """Return all completions of all samples, in order."""
        for number, part in enumerate(self._parts):
            for sequence in range(part.manifest.num_sequences):
                yield self._of(number, sequence)

    def rows(self, stream: str, layer: int) -> Rows:
        """Return the rows of a layer over all samples, sample after sample.

        Returns:
            A view [N, D] over all shards; see `Rows`. Nothing is read yet.

        Raises:
            SpecError: The stream was not recorded.
            LayerError: The layer was not recorded.

        Source:
            See `conventions`.
        """
        view = self._views.get((stream, layer))
        if view is None:
            self.require(stream)
            if not self.has_layer(stream, layer):
                raise LayerError(
                    f"layer {layer} was not recorded: {stream} of this dataset has layers {self.layers[stream]}.",
                    layer=layer,
                )
            view = Rows(self._parts, self._row_starts, self.facts.stream(stream), self._absolute(layer))
            self._views[stream, layer] = view
        return view

    def has_layer(self, stream: str, layer: object) -> bool:
        """Tell whether a layer of a stream was recorded."""
        return self._absolute(layer) in self.layers.get(stream, ())

    def _absolute(self, layer: Any) -> int:
        """Return the number of a layer from the first on; -1 for what is no layer's number."""
        try:
            number = operator.index(layer)
        except TypeError:
            return -1
        return number + self.num_layers if number < 0 else number

    def require(self, stream: str) -> None:
        """Refuse a stream that was not recorded.

        Raises:
            SpecError: Not recorded.
        """
        if stream not in self.layers:
            raise SpecError(f"{stream} was not recorded: this dataset has {list(self.layers)}.")

    def label(self, name: str, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Return labels of rows `start` to `stop`.

        Args:
            name: "positions", "token_ids", "samples" or "completions"; the latter two are repeated for each row.
            start: Number of the first row.
            stop: Number behind that of the last.

        Returns:
            Array [n], int32; int64 for samples. A view of the file's pages where the rows lie in one part.
        """
        start, stop, _ = slice(start, stop).indices(self.num_rows)
        pieces = []
        part = bisect_right(self._row_starts, start) - 1
        while start < stop:
            begin, end = self._row_starts[part], min(self._row_starts[part + 1], stop)
            if end > start:
                pieces.append(_label(self._parts[part], name, start - begin, end - begin))
                start = end
            part += 1
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def record(self, sample: int, completion: int = 0) -> IndexRow:
        """Return what the index says of a sequence; `sample` is the sample's number.

        Raises:
            RowsMissingError: There is no such sequence.
        """
        for row in self.completions(sample):
            if row.completion == completion:
                return row
        raise RowsMissingError(f"there is no completion {completion} of sample {sample}", sample=sample)

    def completions(self, sample: int) -> list[IndexRow]:
        """Return what the index says of all sequences of a sample, which is named by its number."""
        number = bisect_right(self._firsts, sample) - 1
        if number < 0:
            return []
        first, stop = np.searchsorted(self._parts[number].labels.samples, [sample, sample + 1]).tolist()
        return rows_of(self._table(number).slice(first, stop - first))

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """Return the index of all parts as one table: a row for each sequence; see docs/dataset.md for the columns.

        `row_start` and `row_stop` count in `rows` of the dataset, not of a part.
        """
        import pyarrow as pa

        tables = []
        for number, base in enumerate(self._row_starts[:-1]):
            table = self._table(number)
            for name in ("row_start", "row_stop"):
                at = table.column_names.index(name)
                moved = pa.array(table[name].to_numpy() + base, pa.int64())
                table = table.set_column(at, table.schema.field(name), moved)
            tables.append(table.select(columns) if columns is not None else table)
        return pa.concat_tables(tables)

    def where(self, accepts: Callable[[IndexRow], bool]) -> list[Sample]:
        """Return the sequences that a function accepts.

        Args:
            accepts: Called with what the index says of each sequence.
        """
        found = []
        for number in range(len(self._parts)):
            rows = rows_of(self._table(number))
            found += [self._of(number, sequence) for sequence, row in enumerate(rows) if accepts(row)]
        return found

    def batches(
        self,
        stream: str,
        layers: int | Sequence[int],
        *,
        batch_size: int,
        seed: int | None = None,
        block_rows: int = 256,
        mixed_blocks: int = 256,
    ) -> Batches:
        """Return rows in shuffled batches for training; see `store.loader.Batches`."""
        from vllm_tap.store.loader import Batches

        return Batches(
            self, stream, layers, batch_size=batch_size, seed=seed, block_rows=block_rows, mixed_blocks=mixed_blocks
        )

    def __repr__(self) -> str:
        return f"<Dataset {self.path}: {len(self)} samples, {self.num_rows} rows, layers {self.layers}>"


def _common_facts(parts: Sequence[Part]) -> Facts:
    facts = parts[0].facts()
    for part in parts:
        if part.manifest.facts != parts[0].manifest.facts:
            require_same(facts, part.facts(), part.path(""))
    return facts


def _label(part: Part, name: str, start: int, stop: int) -> npt.NDArray[Any]:
    labels = part.labels
    if name in ("positions", "token_ids"):
        array: npt.NDArray[Any] = getattr(labels, name)[start:stop]
        return array
    if name not in ("samples", "completions"):
        raise SpecError(f"rows have no label {name!r}: known are positions, token_ids, samples and completions.")
    numbers = np.searchsorted(labels.starts, np.arange(start, stop), side="right") - 1
    repeated: npt.NDArray[Any] = getattr(labels, name)[numbers]
    return repeated
