"""The rows of a step that one capture takes on a CUDA engine, and what the device knows of it. Worker process."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.engine.capture.selection import Selection
from vllm_tap.engine.cuda import driver, kernel
from vllm_tap.engine.cuda.tables import Tables
from vllm_tap.engine.cuda.tapped_graph import Wanted
from vllm_tap.engine.model.tap import Group, Tap

SMALL_BYTES: Final = 16 << 10
"""So much goes to the device in a copy that the driver takes at once, without a piece of pinned memory of its own."""

_NO_TOKENS: Final = bytes(8)

_pack_header = struct.Struct(f"={kernel.HEADER_WORDS}q").pack
_pack_start = struct.Struct("=2q").pack
_START_BYTES: Final = 16


class PlaneTaker(Protocol):
    """The part of a sink that taps outside graphs talk to."""

    def wants(self, tap: Tap) -> bool:
        """Tell whether this capture takes the rows of a tap."""
        ...

    def goes_by_planes(self, tap: Tap) -> bool:
        """Tell whether the plane of a tap leaves as soon as its layer is through, in this step."""
        ...

    def send_plane(self, tap: Tap, write: Callable[[int], None]) -> None:
        """Have the plane of a tap written to an address, and queue the copy of it."""


class GraphTaps(Protocol):
    """Statement of which taps are on in graphs."""

    on: Wanted


class Owner(Protocol):
    """Resources that groups share: see `rows`."""

    first_tap: int
    main: torch.cuda.Stream | None
    on: Wanted

    @property
    def switch(self) -> GraphTaps:
        """Which taps are on in graphs."""
        ...

    def paused(self) -> None:
        """A group takes nothing more of this step."""


class DeviceGroup(Group):
    """A place for one capture at a time; what the device has been told of one holds for the next.

    Attributes:
        number: Of its tables among those of all groups.
        chosen: Where in the row map the tokens of the step's rows stand, and how many they are.
        active: Whether rows are let through now.
        sink: Where they go; None while no capture has this place.
        taps: Those that are on.
    """

    def __init__(self, number: int, tables: Tables, owner: Owner) -> None:
        super().__init__()
        self.number, self.tables = number, tables
        self.chosen = 0, 0
        self.active = False
        self.sink: PlaneTaker | None = None
        self.taps: frozenset[int] = frozenset()
        self._owner = owner
        self._planes: dict[int, tuple[int, int]] = {}
        self._dirty = False
        self._header_address, self._counts_address = tables.header.data_ptr(), tables.counts.data_ptr()
        # Counts that have come back.
        self._seen = torch.empty(len(tables.counts), dtype=torch.int32, pin_memory=True).numpy()
        self._seen_address = self._seen.ctypes.data
        self._write = driver.memcpy_htod_unchecked()
        self._num_identity = 0
        self._selection: Selection | None = None

    def fail(self, error: Exception) -> None:
        """Take note of what went wrong: several pieces of a step may fail, for one reason."""
        self.active = False
        self.failure = self.failure or error

    def switch_on(self, sink: PlaneTaker, planes: dict[int, tuple[int, int]]) -> None:
        """Let the taps in `planes` {index: (plane, mode)} through, in graphs and outside.

        Without an operation of PyTorch's, each of which lets go of the interpreter's lock: while an engine takes
        prompts in, this took up to 1.6 ms with two of them, once in four captures, and the first step waited.
        """
        stream = torch.cuda.current_stream(self.tables.header.device).cuda_stream
        if planes != self._planes:
            first, num_taps = self._owner.first_tap, self._num_taps({*self._planes, *planes})
            table = np.full((num_taps, 2), -1, np.int32)
            if planes:
                table[[index - first for index in planes]] = list(planes.values())
            driver.memcpy_htod(self.tables.table.data_ptr(), table.tobytes(), stream)
            self._planes, self.taps = planes, frozenset(planes)
        counts_bytes = self.tables.counts.itemsize * self._num_taps(planes)
        driver.memcpy_htod(self._counts_address, bytes(counts_bytes), stream)
        self.sink, self.failure = sink, None

    def _num_taps(self, indices: Sequence[int] | set[int] | dict[int, tuple[int, int]]) -> int:
        """Return how many rows of the tables there are up to the last of these taps."""
        first = self._owner.first_tap
        return max(indices, default=first) - first + 1

    def switch_off(self) -> None:
        """Let nothing through: the capture has ended."""
        self.clear()
        self.sink = None

    def send_counts(self, stream: int) -> npt.NDArray[np.int32]:
        """Queue a copy of how many steps went through each tap, up to the last that is on; return where it arrives.

        That is the same place each time.
        """
        seen = self._seen[: self._num_taps(self._planes)]
        driver.memcpy_dtoh(self._seen_address, self._counts_address, seen.nbytes, stream)
        return seen

    def tell(self, header: Sequence[int], selection: Selection, stream: int) -> None:
        """Send the header of a step to the device, and its selection unless the device has it already."""
        if selection is not self._selection:
            self._send_selection(selection, stream)
        self._owner.switch.on = self._owner.on
        self.num_tokens = header[0]
        driver.memcpy_htod(self._header_address, _pack_header(*header), stream)
        self.active = self._dirty = True

    def tell_again(self, distance: int, stream: int) -> None:
        """Have the kernels do once more what `tell` told them last, so many bytes behind the addresses there."""
        self._owner.switch.on = self._owner.on
        code = self._write(self._header_address, _pack_start(self.num_tokens, distance), _START_BYTES, stream)
        if code:
            driver.check(code, "cuMemcpyHtoDAsync")
        self.active = self._dirty = True

    def _send_selection(self, selection: Selection, stream: int) -> None:
        num_tokens, tables = len(selection.row_map), self.tables
        self._selection = None
        if not selection.is_everything:
            _send(tables.row_map, stream, selection.row_map, selection.sources)
            self._num_identity = 0
        elif num_tokens > self._num_identity:
            _send(tables.row_map, stream, selection.row_map)
            self._num_identity = num_tokens
        _send(tables.numbers, stream, selection.numbers)
        self.chosen = 0 if selection.is_everything else num_tokens, selection.num_rows
        self._selection = selection

    def clear(self) -> None:
        self.active = False
        self._owner.paused()
        main = self._owner.main
        if self._dirty and main is not None:
            driver.memcpy_htod(self._header_address, _NO_TOKENS, main.cuda_stream)
            self._dirty = False


def _send(target: torch.Tensor, stream: int, *pieces: npt.NDArray[np.int32]) -> None:
    """Queue a copy of pieces, one behind the other, to the start of a tensor on the device; `stream` is current."""
    if sum(piece.nbytes for piece in pieces) <= SMALL_BYTES:
        driver.memcpy_htod(target.data_ptr(), b"".join(piece.tobytes() for piece in pieces), stream)
        return
    pinned = torch.empty(sum(map(len, pieces)), dtype=torch.int32, pin_memory=True)
    np.concatenate(pieces, out=pinned.numpy())
    # PyTorch keeps pinned memory until the copies out of it are done.
    target[: len(pinned)].copy_(pinned, non_blocking=True)
