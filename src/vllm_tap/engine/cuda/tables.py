"""Tables that the taps' kernels of a CUDA engine read, and which taps are on. Runs in the worker process."""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from vllm_tap.engine.capture.selection import Selection
from vllm_tap.engine.cuda import driver, kernel
from vllm_tap.engine.cuda.graphs import GraphSwitch
from vllm_tap.engine.cuda.slab import SlabKeeper
from vllm_tap.engine.cuda.tapped_graph import NOTHING
from vllm_tap.engine.model.tap import REGISTRY, Rows, Tap
from vllm_tap.errors import EngineUnsupportedError

logger = logging.getLogger("vllm_tap")


SMALL_BYTES: Final = 16 << 10
"""So much goes to the device in a copy that the driver takes at once, without a piece of pinned memory of its own."""

_NO_TOKENS: Final = bytes(8)

_pack_header = struct.Struct(f"={kernel.HEADER_WORDS}q").pack
_pack_start = struct.Struct("=2q").pack
_START_BYTES: Final = 16


class PlaneTaker(Protocol):
    """The part of a sink that taps outside graphs talk to."""

    failure: Exception | None

    def wants(self, tap: Tap) -> bool:
        """Tell whether this capture takes the rows of a tap."""
        ...

    def goes_by_planes(self, tap: Tap) -> bool:
        """Tell whether the plane of a tap leaves as soon as its layer is through, in this step."""
        ...

    def send_plane(self, tap: Tap, write: Callable[[int], None]) -> None:
        """Have the plane of a tap written to an address, and queue the copy of it."""


class ExpertHolder(Protocol):
    """The part of deferred experts that taps in graphs talk to."""

    def make_room(self) -> None:
        """Take the memory that `hold` needs."""

    def hold(self, taps: Sequence[Tap], tensors: Sequence[torch.Tensor]) -> bool:
        """Hold what passes the taps of a layer's experts; return whether it is held."""
        ...

    def launch_layer(self, taps: Sequence[Tap], tensors: Sequence[torch.Tensor]) -> None:
        """Put the kernel for one layer into the graph that is being captured."""

    def serve(self, held: Sequence[Any]) -> Callable[[], None]:
        """Put one kernel for all held layers into the graph that is being captured."""
        ...


class DeviceRows(Rows):
    """Tables that the kernels read; see `kernel`. A few bytes per token of a step, held as long as the model is.

    Attributes:
        chosen: Where in `row_map` the tokens of the step's rows stand, and how many they are.
        events: For sinks, one after the other.
        passed: Recorded and waited for at once.
    """

    def __init__(
        self,
        max_tokens: int,
        max_taps: int,
        device: torch.device,
        headroom: Callable[[], int],
        step_lock: AbstractContextManager[Any],
    ) -> None:
        super().__init__()
        self.chosen = 0, 0
        self._buffer = torch.zeros(kernel.HEADER_WORDS + max_tokens, dtype=torch.int64, device=device)
        self.header = self._buffer[: kernel.HEADER_WORDS]
        self.row_map = self._buffer[kernel.HEADER_WORDS :].view(torch.int32)
        self.numbers = torch.zeros(max_tokens, dtype=torch.int32, device=device)
        self.table = torch.full((max_taps, 2), -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(max_taps, dtype=torch.int32, device=device)
        self._seen = torch.empty(max_taps, dtype=torch.int32, pin_memory=True).numpy()  # counts that have come back
        self.first_tap = len(REGISTRY)
        self.experts: ExpertHolder | None = None
        self.switch = GraphSwitch(self.fail, self._serve_experts, step_lock)
        self.headroom = headroom
        self.slabs = SlabKeeper(device, headroom, self.is_quiet, self.switch.forget, self._complete_pieces)
        self.main: torch.cuda.Stream | None = None
        self.sink: PlaneTaker | None = None
        self.active = False
        self.refusal = ""
        self._planes: dict[int, tuple[int, int]] = {}
        self._on: frozenset[int] = NOTHING
        self.events, self.passed = driver.Events(), driver.Event()
        self._side: torch.cuda.Stream | None = None
        self._dirty = False
        self._header_address, self._counts_address = self.header.data_ptr(), self.counts.data_ptr()
        self._seen_address = self._seen.ctypes.data
        self._context = driver.current_context()
        self._write = driver.bare_write()
        self._num_identity = 0
        self._selection: Selection | None = None
        self._anchors: dict[torch.dtype, torch.Tensor] = {}

    def _serve_experts(self, held: Sequence[Any]) -> Callable[[], None]:
        assert self.experts is not None
        return self.experts.serve(held)

    @property
    def num_graph_nodes(self) -> int:
        return self.switch.num_nodes

    @property
    def staging_bytes(self) -> int:
        return self.slabs.held_bytes

    def is_quiet(self) -> bool:
        """Tell whether the engine's stream has nothing to do."""
        return self.main is None or bool(self.main.query())

    @property
    def is_preparing(self) -> bool:
        return self.slabs.is_preparing

    def _complete_pieces(self) -> bool:
        return self.switch.complete_pieces(self.is_quiet)

    def anchor(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a device pointer of a dtype from which destinations are counted; see `kernel`."""
        if dtype not in self._anchors:
            self._anchors[dtype] = torch.empty(16, dtype=dtype, device=self.header.device)
        return self._anchors[dtype]

    def side_stream(self) -> int:
        """Return the stream on which rows leave the device."""
        if self._side is None:
            self._side = torch.cuda.Stream(self.header.device)
        return self._side.cuda_stream

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Queue what another thread does on the engine's stream."""
        driver.use_context(self._context)
        with torch.cuda.device(self.header.device), torch.cuda.stream(self.main):
            yield

    def fail(self, error: Exception) -> None:
        """Take note of what went wrong in a tap: the end of the capture under way; of all, if there is none."""
        if self.sink is not None and (self.active or self.sink.failure is not None):
            self.active = False
            self.sink.failure = self.sink.failure or error  # several pieces of a step may fail, for one reason
        elif not self.refusal:
            self.refusal = f"the taps' kernels do not run on this device ({type(error).__name__}: {error})"
            logger.warning("vllm-tap cannot capture from this engine, plain generation goes on: %s", self.refusal)

    def require_room(self, indices: Iterable[int]) -> None:
        """Refuse taps for which the tables have no room.

        Raises:
            EngineUnsupportedError: There are some.
        """
        num_taps = self._num_taps(indices)
        if num_taps > len(self.table):
            raise EngineUnsupportedError(
                f"tap {num_taps} of this model is one too many: there is room for {len(self.table)}. "
                "Leave out the last layers."
            )

    def switch_on(self, sink: PlaneTaker, planes: dict[int, tuple[int, int]]) -> None:
        """Let the taps in `planes` {index: (plane, mode)} through, in graphs and outside.

        Without an operation of PyTorch's, each of which lets go of the interpreter's lock: while an engine takes
        prompts in, this took up to 1.6 ms with two of them, once in four captures, and the first step waited.
        """
        stream = torch.cuda.current_stream(self.header.device).cuda_stream
        if planes != self._planes:
            num_taps = self._num_taps({*self._planes, *planes})
            table = np.full((num_taps, 2), -1, np.int32)
            if planes:
                table[[index - self.first_tap for index in planes]] = list(planes.values())
            driver.write_words(self.table.data_ptr(), table.tobytes(), stream)
            self._planes, self._on = planes, frozenset(planes)
        driver.write_words(self._counts_address, bytes(self.counts.itemsize * self._num_taps(planes)), stream)
        self.sink = sink

    def _num_taps(self, indices: Iterable[int]) -> int:
        """Return how many rows of the tables there are up to the last of these taps."""
        return max(indices, default=self.first_tap) - self.first_tap + 1

    def switch_off(self) -> None:
        """Let nothing through."""
        self.clear()
        self.sink = None

    def send_counts(self, stream: int) -> npt.NDArray[np.int32]:
        """Queue a copy of how many steps went through each tap, up to the last that is on; return where it arrives.

        That is the same place each time.
        """
        seen = self._seen[: self._num_taps(self._planes)]
        driver.read_words(self._seen_address, self._counts_address, seen.nbytes, stream)
        return seen

    def arm(self, header: Sequence[int], selection: Selection, stream: int) -> None:
        """Send the header of a step to the device, and its selection unless the device has it already."""
        if selection is not self._selection:
            self._send_selection(selection, stream)
        self.switch.on = self._on
        self.num_tokens = header[0]
        driver.write_words(self._header_address, _pack_header(*header), stream)
        self.active = self._dirty = True

    def arm_again(self, distance: int, stream: int) -> None:
        """Have the kernels do once more what `arm` told them last, so many bytes behind the addresses there."""
        self.switch.on = self._on
        code = self._write(self._header_address, _pack_start(self.num_tokens, distance), _START_BYTES, stream)
        if code:
            driver.check(code, "cuMemcpyHtoDAsync")
        self.active = self._dirty = True

    def _send_selection(self, selection: Selection, stream: int) -> None:
        num_tokens = len(selection.row_map)
        self._selection = None
        if not selection.is_everything:
            _send(self.row_map, stream, selection.row_map, selection.sources)
            self._num_identity = 0
        elif num_tokens > self._num_identity:
            _send(self.row_map, stream, selection.row_map)
            self._num_identity = num_tokens
        _send(self.numbers, stream, selection.numbers)
        self.chosen = 0 if selection.is_everything else num_tokens, selection.num_rows
        self._selection = selection

    def clear(self) -> None:
        self.active = False
        self.switch.on = NOTHING
        if self._dirty and self.main is not None:
            driver.write_words(self._header_address, _NO_TOKENS, self.main.cuda_stream)
            self._dirty = False


def _send(target: torch.Tensor, stream: int, *pieces: npt.NDArray[np.int32]) -> None:
    """Queue a copy of pieces, one behind the other, to the start of a tensor on the device; `stream` is current."""
    if sum(piece.nbytes for piece in pieces) <= SMALL_BYTES:
        driver.write_words(target.data_ptr(), b"".join(piece.tobytes() for piece in pieces), stream)
        return
    pinned = torch.empty(sum(map(len, pieces)), dtype=torch.int32, pin_memory=True)
    np.concatenate(pieces, out=pinned.numpy())
    # PyTorch keeps pinned memory until the copies out of it are done.
    target[: len(pinned)].copy_(pinned, non_blocking=True)
