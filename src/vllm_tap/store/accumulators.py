"""Accumulators over blocks of rows, in constant memory, in float64, mergeable. In any process.

Each takes blocks with `update`, joins another one with `merge`, and is saved and loaded as a safetensors file. Blocks
are arrays or tensors [R, D] of any dtype; of a dataset, `Rows.blocks()`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import DatasetDamagedError, SpecError
from vllm_tap.store.shard import Array, header

Floats = npt.NDArray[np.float64]


def as_floats(block: Any) -> Floats:
    """Return rows [R, D] in float64."""
    if hasattr(block, "detach"):
        block = block.detach().double().numpy()
    rows: Floats = np.asarray(block, np.float64)
    if rows.ndim != 2:
        raise SpecError(f"a block has rows and elements [R, D], got {list(rows.shape)}.")
    return rows


class Accumulator:
    """Base: arrays by name that are added up, saved and loaded."""

    kind: ClassVar[str] = ""

    def arrays(self) -> dict[str, Floats]:
        """Return what makes up the state, by names."""
        raise NotImplementedError

    @classmethod
    def of(cls, arrays: Mapping[str, Floats]) -> Self:
        """Return the accumulator of a state."""
        raise NotImplementedError

    def save(self, path: str | Path) -> None:
        """Write the state as a safetensors file of float64 tensors."""
        arrays = {name: np.ascontiguousarray(array, np.float64) for name, array in self.arrays().items()}
        head = header({name: Array("float64", array.shape) for name, array in arrays.items()}, {"kind": self.kind})
        Path(path).write_bytes(head + b"".join(array.tobytes() for array in arrays.values()))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DatasetDamagedError: It is no such file, or one of another kind.
        """
        data = Path(path).read_bytes()
        try:
            size = int.from_bytes(data[:8], "little")
            fields = json.loads(data[8 : 8 + size])
            kind = fields.pop("__metadata__")["kind"]
            arrays = {name: _array(data[8 + size :], field) for name, field in fields.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DatasetDamagedError(f"{path} is no saved accumulator: {error!r}", path=str(path)) from error
        if kind != cls.kind:
            raise DatasetDamagedError(f"{path} holds {kind!r}, not {cls.kind!r}", path=str(path))
        return cls.of(arrays)


def _array(data: bytes, field: Mapping[str, Any]) -> Floats:
    start, stop = field["data_offsets"]
    array: Floats = np.frombuffer(data[start:stop], np.float64).reshape(field["shape"]).copy()
    return array


class Moments(Accumulator):
    """Count, mean, variance and largest magnitude of each element, and the mean norm of rows.

    Attributes:
        count: Rows.
        mean: float64 [D].
        max_abs: float64 [D].
    """

    kind = "moments"

    def __init__(self) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(0)
        self.max_abs: Floats = np.zeros(0)
        self._squares: Floats = np.zeros(0)
        self._norms = 0.0

    def update(self, block: Any) -> None:
        """Take a block [R, D]."""
        rows = as_floats(block)
        if not len(rows):
            return
        one = Moments()
        one.count, one.mean = len(rows), rows.mean(0)
        one._squares = ((rows - one.mean) ** 2).sum(0)
        one.max_abs = np.abs(rows).max(0)
        one._norms = float(np.linalg.norm(rows, axis=1).sum())
        self.merge(one)

    def merge(self, other: Moments) -> None:
        """Add what another one has taken."""
        if not other.count:
            return
        if not self.count:
            self.mean, self._squares = np.zeros_like(other.mean), np.zeros_like(other.mean)
            self.max_abs = np.zeros_like(other.mean)
        total = self.count + other.count
        delta = other.mean - self.mean
        self._squares = self._squares + other._squares + delta**2 * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.max_abs = np.maximum(self.max_abs, other.max_abs)
        self._norms += other._norms
        self.count = total

    @property
    def variance(self) -> Floats:
        """Variance of each element, with `count` as the divisor. float64 [D]."""
        return self._squares / max(self.count, 1)

    @property
    def mean_norm(self) -> float:
        """Mean Euclidean norm of the rows."""
        return self._norms / max(self.count, 1)

    def arrays(self) -> dict[str, Floats]:
        """Return the state."""
        return {
            "count": np.array([self.count], np.float64),
            "mean": self.mean,
            "squares": self._squares,
            "max_abs": self.max_abs,
            "norms": np.array([self._norms]),
        }

    @classmethod
    def of(cls, arrays: Mapping[str, Floats]) -> Self:
        """Return the accumulator of a state."""
        one = cls()
        one.count, one._norms = int(arrays["count"][0]), float(arrays["norms"][0])
        one.mean, one._squares, one.max_abs = arrays["mean"], arrays["squares"], arrays["max_abs"]
        return one


class Covariance(Accumulator):
    """Covariance of the elements, and their principal components. Takes 8 D^2 bytes.

    Attributes:
        count: Rows.
        mean: float64 [D].
    """

    kind = "covariance"

    def __init__(self) -> None:
        self.count = 0
        self.mean: Floats = np.zeros(0)
        self._products: Floats = np.zeros((0, 0))

    def update(self, block: Any) -> None:
        """Take a block [R, D]."""
        rows = as_floats(block)
        if not len(rows):
            return
        one = Covariance()
        one.count, one.mean = len(rows), rows.mean(0)
        centred = rows - one.mean
        one._products = centred.T @ centred
        self.merge(one)

    def merge(self, other: Covariance) -> None:
        """Add what another one has taken."""
        if not other.count:
            return
        if not self.count:
            self.mean, self._products = np.zeros_like(other.mean), np.zeros_like(other._products)
        total = self.count + other.count
        delta = other.mean - self.mean
        self._products = self._products + other._products
        self._products += np.outer(delta, delta) * (self.count * other.count / total)
        self.mean = self.mean + delta * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Floats:
        """Covariance, with `count` as the divisor. float64 [D, D]."""
        return self._products / max(self.count, 1)

    def pca(self, num_components: int) -> tuple[Floats, Floats]:
        """Return principal components of the centred rows.

        Returns:
            Components float64 [k, D], orthonormal, that of the largest variance first, the largest element of each
            positive; and their variances float64 [k].
        """
        variances, vectors = np.linalg.eigh(self.covariance)
        order = np.argsort(variances)[::-1][:num_components]
        components = vectors[:, order].T
        largest = np.abs(components).argmax(1)
        components = components * np.sign(components[np.arange(len(order)), largest])[:, None]
        return components, variances[order]

    def arrays(self) -> dict[str, Floats]:
        """Return the state."""
        return {"count": np.array([self.count], np.float64), "mean": self.mean, "products": self._products}

    @classmethod
    def of(cls, arrays: Mapping[str, Floats]) -> Self:
        """Return the accumulator of a state."""
        one = cls()
        one.count, one.mean, one._products = int(arrays["count"][0]), arrays["mean"], arrays["products"]
        return one


class LabelMeans(Accumulator):
    """Mean row of each label, and differences of them: directions between two sets of rows.

    Attributes:
        moments: {label: `Moments` of its rows}.
    """

    kind = "label means"

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}

    def update(self, block: Any, labels: Any) -> None:
        """Take a block [R, D] whose rows have these labels [R], or all of them one label, a text."""
        rows = as_floats(block)
        given = np.full(len(rows), labels) if isinstance(labels, str) else np.asarray(labels).astype(str)
        if given.shape != (len(rows),):
            raise SpecError(f"{len(rows)} rows have labels of shape {list(given.shape)}: pass one for each.")
        for label in np.unique(given):
            self.moments.setdefault(str(label), Moments()).update(rows[given == label])

    def merge(self, other: LabelMeans) -> None:
        """Add what another one has taken."""
        for label, moments in other.moments.items():
            self.moments.setdefault(label, Moments()).merge(moments)

    def difference(self, label: str, minus: str) -> Floats:
        """Return the mean row of one label minus that of another. float64 [D].

        Raises:
            SpecError: No row had such a label.
        """
        for name in (label, minus):
            if name not in self.moments:
                raise SpecError(f"no row has the label {name!r}: known are {sorted(self.moments)}.")
        return self.moments[label].mean - self.moments[minus].mean

    def arrays(self) -> dict[str, Floats]:
        """Return the state."""
        return {f"{label}/{name}": array for label, one in self.moments.items() for name, array in one.arrays().items()}

    @classmethod
    def of(cls, arrays: Mapping[str, Floats]) -> Self:
        """Return the accumulator of a state."""
        by_label: dict[str, dict[str, Floats]] = {}
        for name, array in arrays.items():
            label, _, field = name.rpartition("/")
            by_label.setdefault(label, {})[field] = array
        one = cls()
        one.moments = {label: Moments.of(fields) for label, fields in by_label.items()}
        return one


class ExpertCounts(Accumulator):
    """Counts of the choices of each expert of a layer, alone and with others. Blocks are expert ids [R, K].

    Attributes:
        num_rows: Rows that were taken.
        counts: float64 [E].
        together: float64 [E, E], rows in which both experts were chosen; the diagonal is `counts`.
    """

    kind = "expert counts"

    def __init__(self, num_experts: int) -> None:
        self.num_rows = 0
        self.together: Floats = np.zeros((num_experts, num_experts))

    @property
    def counts(self) -> Floats:
        """Choices of each expert. float64 [E]."""
        return self.together.diagonal().copy()

    def update(self, block: Any) -> None:
        """Take expert ids [R, K].

        Raises:
            SpecError: An id that is no expert's.
        """
        ids = as_floats(block).astype(np.int64)
        num_experts = len(self.together)
        if ids.size and not (ids.min() >= 0 and ids.max() < num_experts):
            raise SpecError(f"expert ids from {ids.min()} to {ids.max()}, there are {num_experts} experts.")
        chosen = np.zeros((len(ids), num_experts))
        np.put_along_axis(chosen, ids, 1.0, axis=1)
        self.together += chosen.T @ chosen
        self.num_rows += len(ids)

    def merge(self, other: ExpertCounts) -> None:
        """Add what another one has taken."""
        self.together = self.together + other.together
        self.num_rows += other.num_rows

    def arrays(self) -> dict[str, Floats]:
        """Return the state."""
        return {"num_rows": np.array([self.num_rows], np.float64), "together": self.together}

    @classmethod
    def of(cls, arrays: Mapping[str, Floats]) -> Self:
        """Return the accumulator of a state."""
        one = cls(0)
        one.num_rows, one.together = int(arrays["num_rows"][0]), arrays["together"]
        return one


def norms_by_layer(dataset: Any, stream: str = "hidden_states") -> dict[int, float]:
    """Return the mean norm of the rows of each layer of a dataset.

    Cost:
        One pass over the stream.
    """
    norms = {}
    for layer in dataset.layers[stream]:
        moments = Moments()
        for block in dataset.rows(stream, layer).blocks():
            moments.update(block)
        norms[layer] = moments.mean_norm
    return norms
