"""Blocks of each layer and the rows that they add to the residual stream, confirmed by the sum. Worker process.

Of the first rows, the stream before a layer and what is said to be added to it must be the stream behind the layer.
Where a norm may stand behind a block, or two blocks may be added, the sum also tells what it is made of.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import torch

from vllm_tap.engine.model.tap import Probe, Tap
from vllm_tap.streams import BLOCK_STREAMS
from vllm_tap.vllm.blocks import Block

# In units of the resolution of the coarsest dtype, of the magnitudes that are added in each element. Two sums, a scale
# and the stream itself are rounded, by half a unit each at most, and a norm once more that a compiler fuses with a sum.
MOST_UNITS: Final = 2.5
SEPARATION: Final = 3.0
"""So many times as far off any other sum is. Where the right one comes out exactly, an eighth of a unit counts."""

NO_STREAM: Final = "the rows that go into it were not seen"


class Addend(NamedTuple):
    """A place of a layer where something passes that may be added to the stream."""

    block: Block
    tap: Tap


Pick = tuple[Addend, ...]
"""Places whose rows add up to what a layer's blocks of one kind hand to the stream; usually one."""


class Sum(NamedTuple):
    """A way in which the stream behind a layer may come about.

    Attributes:
        picks: Of each stream in `BLOCK_STREAMS`.
        units: How far off it is, in units of rounding.
        relative: How far off it is, relative to what the layer adds.
    """

    picks: tuple[Pick, ...]
    units: float
    relative: float

    @property
    def names(self) -> str:
        """The modules whose rows are added."""
        names = [" + ".join(str(one.block) for one in pick) for pick in self.picks if pick]
        return " and ".join(names) or "no module"

    @property
    def num_norms(self) -> int:
        """The number of its places that are norms behind blocks."""
        return sum(one.block.is_norm for pick in self.picks for one in pick)


class LayerBlocks:
    """The blocks of one layer.

    Attributes:
        addends: Places where something passes that may be added to the stream.
        refusals: Why a stream cannot be taken here: {stream: reason}.
        chosen: The places of the streams that can.
        is_settled: True if rows have told.
    """

    def __init__(self, addends: Sequence[Addend], before: Tap | None, behind: Tap) -> None:
        self.addends, self._before, self._behind = addends, before, behind
        self.refusals: dict[str, str] = {}
        self.chosen: dict[str, Addend] = {}
        self.is_settled = not addends

    @property
    def taps(self) -> list[Tap]:
        """The taps whose rows tell."""
        ends = [self._behind] if self._before is None else [self._before, self._behind]
        return [*ends, *(one.tap for one in self.addends)]

    @property
    def wants_rows(self) -> bool:
        """True if the layer has run, with rows that had no values in them."""
        return not self.is_settled and self._behind.probe is not None

    def look(self) -> list[Sum]:
        """Return the sums that fit the rows of the last forward pass through the layer, if more than one does."""
        behind = None if self.is_settled else self._behind.probe
        if behind is None:
            return []
        before = None if self._before is None else self._before.probe
        if before is None or before.number != behind.number or before.hidden.shape != behind.hidden.shape:
            self.refuse(NO_STREAM)
            return []
        ran = [one for one in self.addends if _passed_with(one.tap.probe, behind)]
        sums = sorted(_sums(ran, before, behind), key=lambda found: found.units)
        return self._judge(sums) if sums else []

    def _judge(self, sums: list[Sum]) -> list[Sum]:
        best = sums[0]
        if best.units > MOST_UNITS:
            self.refuse(
                f"the stream before it, {best.names} do not add up to the stream behind it: off by "
                f"{best.relative:.2g} of what it adds, {best.units:.3g} times rounding"
            )
            return []
        rivals = [found for found in sums[1:] if found.units < SEPARATION * max(best.units, 1 / 8)]
        if rivals and not all(_are_same(best, found) for found in rivals):
            return [found for found in sums if found.units <= MOST_UNITS]
        # Where the attention of a first forward pass gives zeros, a norm behind it does so, too: the last one counts.
        self.settle(max([best, *rivals], key=lambda found: found.num_norms))
        return []

    def settle(self, found: Sum) -> None:
        """Take the places that a sum is made of."""
        self.is_settled = True
        for stream, pick in zip(BLOCK_STREAMS, found.picks, strict=True):
            if len(pick) == 1:
                self.chosen[stream] = pick[0]
            elif pick:
                names = ", ".join(one.block.name for one in pick)
                self.refusals[stream] = f"it adds the outputs of several blocks of the kind: {names}"

    def refuse(self, reason: str) -> None:
        """Refuse all streams of the layer."""
        self.is_settled = True
        self.refusals = {one.block.stream: reason for one in self.addends}


def look_at(layers: dict[int, LayerBlocks]) -> None:
    """Decide by the rows of the last forward pass. Layers whose own rows do not tell are as those like them."""
    open_layers = {layer: (blocks, blocks.look()) for layer, blocks in layers.items()}
    told = {
        _kind(blocks): {one.block.name for one in blocks.chosen.values()} for blocks in layers.values() if blocks.chosen
    }
    for blocks, sums in open_layers.values():
        if sums:
            names = told.get(_kind(blocks))
            alike = [found for found in sums if {one.block.name for pick in found.picks for one in pick} == names]
            if alike:
                blocks.settle(alike[0])
            else:
                blocks.refuse(f"its rows do not tell what adds to the stream: {'; or '.join(s.names for s in sums)}")


def reasons_of(layers: dict[int, LayerBlocks]) -> dict[str, str]:
    """Return why streams cannot be taken: {stream: reason}, with the first layer that says so."""
    refused = [(layer, *item) for layer, blocks in layers.items() for item in blocks.refusals.items()]
    return {stream: f"layer {layer}: {reason}" for layer, stream, reason in reversed(refused)}


def convention_of(layers: dict[int, LayerBlocks], stream: str) -> str:
    """Return which tensor the rows of a stream are."""
    chosen = [blocks.chosen[stream] for blocks in layers.values() if stream in blocks.chosen]
    return "output of " + " or ".join(dict.fromkeys(str(one.block) for one in chosen))


def _kind(blocks: LayerBlocks) -> tuple[str, ...]:
    return tuple(one.block.name for one in blocks.addends)


def _picks(ran: list[Addend], stream: str) -> Iterable[Pick]:
    """Return what may be handed to the stream by blocks of a kind."""
    found = [one for one in ran if one.block.stream == stream]
    blocks = tuple(one for one in found if not one.block.is_norm)
    if not found:
        yield ()
    yield from ((one,) for one in found)
    if len(blocks) > 1:
        yield blocks


def _sums(ran: list[Addend], before: Probe, behind: Probe) -> list[Sum]:
    """Return all sums and how far off they are; none if the rows have no values in them."""
    rows = {one: _streams(one.tap.probe)[-1] for one in ran if one.tap.probe is not None}
    starts, ends = _streams(before), _streams(behind)
    usable = torch.isfinite(ends[-1]).all(-1) & torch.isfinite(starts[-1]).all(-1) & (ends[-1] != 0).any(-1)
    if not usable.any():
        return []
    dtypes = [
        tensor.dtype for probe in (before, behind) for tensor in (probe.hidden, probe.residual) if tensor is not None
    ]
    dtypes += [one.tap.probe.hidden.dtype for one in ran if one.tap.probe is not None]
    unit = max(torch.finfo(dtype).eps for dtype in dtypes)
    sums = []
    for picks in itertools.product(*(list(_picks(ran, stream)) for stream in BLOCK_STREAMS)):
        added = [rows[one][usable] for pick in picks for one in pick]
        # Layers return the stream in one tensor or in two: the same sum tells which.
        errors = [_error(start[usable], end[usable], added, unit) for start in starts for end in ends]
        sums.append(Sum(picks, *min(errors)))
    return sums


def _error(before: torch.Tensor, behind: torch.Tensor, added: list[torch.Tensor], unit: float) -> tuple[float, float]:
    """Return how far off a sum is, in units of rounding, and relative to what is added."""
    error = behind - before - sum(added)
    size = behind.abs() + before.abs() + sum(rows.abs() for rows in added)
    units = float((error / size.clamp(min=1e-300)).square().mean().sqrt()) / unit
    relative = float(error.square().mean().sqrt() / (behind - before).square().mean().sqrt())
    return units if units == units else float("inf"), relative


def _streams(probe: Probe) -> list[torch.Tensor]:
    """Return the first tensor that passed, and the sum of both if there were two, in float64 on the host."""
    hidden = probe.hidden.double().cpu()
    return [hidden] if probe.residual is None else [hidden, hidden + probe.residual.double().cpu()]


def _passed_with(probe: Probe | None, behind: Probe) -> bool:
    return probe is not None and probe.number == behind.number and probe.hidden.shape == behind.hidden.shape


def _are_same(one: Sum, other: Sum) -> bool:
    """Tell whether two sums are of the same rows, as where a module returns what a part of it does."""
    pairs = list(zip(one.picks, other.picks, strict=True))
    return all(len(a) == len(b) for a, b in pairs) and all(
        torch.equal(x.tap.probe.hidden, y.tap.probe.hidden)  # type: ignore[union-attr]
        for a, b in pairs
        for x, y in zip(a, b, strict=True)
    )
