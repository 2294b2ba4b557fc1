"""Shuffled batches of rows for training, the same from a seed whatever loads them. In any process.

An epoch's order is computed, not drawn as it goes: blocks of neighbouring rows are permuted, `mixed_blocks` of them at
a time make a pool, and the rows of a pool are permuted. So a batch is known by its number: any number of workers loads
the same epoch, and a run that was interrupted goes on with the next batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import SpecError
from vllm_tap.store.rows import Rows

if TYPE_CHECKING:
    import torch


class RowViews(Protocol):
    """A dataset, as far as batches of its rows need it."""

    @property
    def num_rows(self) -> int:
        """Rows of each layer."""
        ...

    def rows(self, stream: str, layer: int) -> Rows:
        """Return all rows of a layer."""
        ...


class Order:
    """The order of an epoch.

    Args:
        num_rows: Rows in all.
        batch_size: Rows of a batch; the last one has what is left.
        block_rows: Neighbouring rows that stay in one pool: what is read from the disk in one go.
        mixed_blocks: Blocks of a pool.
        seed: Seed; None for the rows' own order.
    """

    def __init__(self, num_rows: int, batch_size: int, block_rows: int, mixed_blocks: int, seed: int | None) -> None:
        for name, value in (("batch_size", batch_size), ("block_rows", block_rows), ("mixed_blocks", mixed_blocks)):
            if value < 1:
                raise SpecError(f"{name} is a whole number from 1 on, got {value}.")
        self.num_rows, self.batch_size, self.seed = num_rows, batch_size, seed
        self._block_rows = block_rows
        # Batches do not reach from one pool into the next.
        self._pool_rows = -(-block_rows * mixed_blocks // batch_size) * batch_size
        self._pool = functools.lru_cache(2)(self._make_pool)
        self._blocks = functools.lru_cache(2)(self._make_blocks)

    @property
    def num_batches(self) -> int:
        """Batches of an epoch."""
        return -(-self.num_rows // self.batch_size)

    def batch(self, epoch: int, number: int) -> npt.NDArray[np.int64]:
        """Return the numbers of a batch's rows, ascending: int64 [batch_size]."""
        start = number * self.batch_size
        if self.seed is None:
            return np.arange(start, min(start + self.batch_size, self.num_rows))
        pool, at = divmod(start, self._pool_rows)
        # Which rows are in a batch is drawn; in which order does not matter, and sorted they are read faster.
        return np.sort(self._pool(epoch, pool)[at : at + self.batch_size])

    def _make_blocks(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return where each block begins, in the order of the epoch."""
        count = -(-self.num_rows // self._block_rows)
        return np.random.default_rng([self.seed or 0, epoch]).permutation(count) * self._block_rows

    def _make_pool(self, epoch: int, pool: int) -> npt.NDArray[np.int64]:
        """Return the numbers of a pool's rows, mixed."""
        blocks = self._blocks(epoch)
        # One block of the epoch is short, the one at the end of the rows; what lies behind it moves up by that much.
        start, stop = pool * self._pool_rows, min((pool + 1) * self._pool_rows, self.num_rows)
        short = int(np.flatnonzero(blocks + self._block_rows > self.num_rows)[0]) if self._is_uneven else len(blocks)
        gap = -self.num_rows % self._block_rows
        flat = np.arange(start, stop)
        flat = flat + np.where(flat >= (short + 1) * self._block_rows - gap, gap, 0)
        numbers = blocks[flat // self._block_rows] + flat % self._block_rows
        mixed: npt.NDArray[np.int64] = np.random.default_rng([self.seed or 0, epoch, pool, 1]).permutation(numbers)
        return mixed

    @property
    def _is_uneven(self) -> bool:
        return bool(self.num_rows % self._block_rows)


class RowBatch(NamedTuple):
    """A batch of rows.

    Attributes:
        rows: Tensor [B, D], or [B, L, D] for several layers, in the stream's dtype.
        numbers: Numbers of the rows in `Dataset.rows`. Tensor int64 [B].
    """

    rows: torch.Tensor
    numbers: torch.Tensor


class Batches(Sequence[RowBatch]):
    """Batches of an epoch by their numbers, a map-style dataset of torch: `DataLoader(batches, batch_size=None)`.

    `loader(num_workers=4)` makes that `DataLoader`. Iterated, this goes on with the batch behind the last one that was
    taken, until the epoch ends; then the next epoch begins. `state_dict` says where that is.

    Args:
        dataset: Where rows come from.
        stream: Which stream.
        layers: A layer, or several.
        batch_size: Rows of a batch.
        seed: Seed of the order; None for the rows' own order.
        block_rows: See `Order`.
        mixed_blocks: See `Order`.
    """

    def __init__(
        self,
        dataset: RowViews,
        stream: str,
        layers: int | Sequence[int],
        *,
        batch_size: int,
        seed: int | None,
        block_rows: int,
        mixed_blocks: int,
    ) -> None:
        self._dataset, self._stream = dataset, stream
        self._layers = layers if isinstance(layers, int) else tuple(layers)
        self._options = {
            "batch_size": batch_size,
            "block_rows": block_rows,
            "mixed_blocks": mixed_blocks,
            "seed": seed,
        }
        self.epoch, self._next = 0, 0
        self._open()

    def _open(self) -> None:
        layers = (self._layers,) if isinstance(self._layers, int) else self._layers
        self._rows: list[Rows] = [self._dataset.rows(self._stream, layer) for layer in layers]
        self._order = Order(self._dataset.num_rows, **self._options)  # type: ignore[arg-type]

    def __getstate__(self) -> dict[str, Any]:
        names = ("_dataset", "_stream", "_layers", "_options", "epoch", "_next")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return self._order.num_batches

    def __getitem__(self, number: Any) -> Any:
        """Return a batch of this epoch.

        Cost:
            One gather for each layer and each part that the batch meets.
        """
        import torch

        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        chosen = self._order.batch(self.epoch, number)
        rows = [one.take(chosen) for one in self._rows]
        stacked = rows[0] if isinstance(self._layers, int) else torch.stack(rows, 1)
        return RowBatch(stacked, torch.from_numpy(chosen.copy()))

    def __iter__(self) -> Iterator[RowBatch]:
        """Return what is left of this epoch."""
        return self._counted(self[number] for number in range(self._next, len(self)))

    def loader(self, num_workers: int = 0, **options: Any) -> Iterator[RowBatch]:
        """Return what is left of this epoch, loaded by worker processes; the batches are the same for any number.

        Args:
            num_workers: Processes.
            **options: More arguments of `torch.utils.data.DataLoader`, such as `pin_memory=True`.
        """
        from torch.utils.data import DataLoader

        left: Any = range(self._next, len(self))
        source: Any = self  # a map-style dataset is whatever has a length and items
        return self._counted(DataLoader(source, batch_size=None, sampler=left, num_workers=num_workers, **options))

    def _counted(self, batches: Any) -> Iterator[RowBatch]:
        for batch in batches:
            self._next += 1
            yield RowBatch(*batch)
        self.epoch, self._next = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return where this is: behind the last batch that was taken."""
        return {**self._options, "epoch": self.epoch, "batch": self._next, "num_rows": self._order.num_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state says.

        Raises:
            SpecError: The state is of another order or of another number of rows: its batches are not these.
        """
        mine = self.state_dict()
        other = [name for name in mine if name not in ("epoch", "batch") and state.get(name) != mine[name]]
        if other:
            name = other[0]
            raise SpecError(f"this state is of batches with {name}={state.get(name)}; these have {name}={mine[name]}.")
        self.epoch, self._next = int(state["epoch"]), int(state["batch"])
