"""Where the taps of a CUDA engine write: staging on the device, drained by a side stream into pinned segments.

Runs in the worker process. Three ways lead from a tap into the block of the step, chosen per stream and step:

- staged: all planes of the step in a ring of rows, one 2-D copy after the forward pass; the way of decode steps, whose
  taps run inside captured graphs.
- ring: plane by plane in a small ring of bytes, each copied as soon as its layer is through; the way of large prefill
  steps, which run outside graphs: the copies hide behind the layers that follow, and little memory is needed.
- direct: the tap stores into pinned host memory; no device memory at all.

Every reuse of staging is ordered between streams; the host never waits in a step.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final

import numpy as np
import torch

from vllm_tap.engine import cuda, kernel
from vllm_tap.engine.graphs import GraphSwitch
from vllm_tap.engine.ring import Ring
from vllm_tap.engine.rows import Batch, Selection
from vllm_tap.engine.slab import Slab, SlabKeeper, aligned
from vllm_tap.engine.tap import LIBRARY, REGISTRY, Rows, Tap, flat
from vllm_tap.errors import BudgetError, CaptureError, EngineUnsupportedError
from vllm_tap.frame.layout import Layout, Stream
from vllm_tap.labels import NUM_LABELS
from vllm_tap.transport.memory import Segment
from vllm_tap.transport.pool import Block, SegmentPool

logger = logging.getLogger("vllm_tap")

STREAM_NUMBERS: Final = {
    name: number
    for number, name in enumerate(
        ("hidden_states", "embeddings", "final_hidden_states", "router_logits", "expert_ids", "expert_weights")
    )
}

WIDE_PLANE_BYTES: Final = 16 << 20
"""A plane of a full step at least this large goes plane by plane: below about 1 MiB a copy loses a third of its rate,
and every copy costs the host about 20 microseconds."""

MIN_STAGED_ROWS: Final = 512
RING_PLANES: Final = 4


class DeviceRows(Rows):
    """What the kernels read; see `kernel`. A few bytes per token of a step, held as long as the model is."""

    def __init__(self, max_tokens: int, max_taps: int, device: torch.device, headroom: Callable[[], int]) -> None:
        super().__init__()
        self._buffer = torch.zeros(kernel.HEADER_WORDS + (max_tokens + 1) // 2, dtype=torch.int64, device=device)
        self.header = self._buffer[: kernel.HEADER_WORDS]
        self.row_map = self._buffer[kernel.HEADER_WORDS :].view(torch.int32)
        self.table = torch.full((max_taps, 2), -1, dtype=torch.int32, device=device)
        self.counts = torch.zeros(max_taps, dtype=torch.int32, device=device)
        self.first_tap = len(REGISTRY)
        self.switch = GraphSwitch()
        self.headroom = headroom
        self.slabs = SlabKeeper(device, headroom, self._is_quiet)
        self.main: torch.cuda.Stream | None = None
        self.sink: DeviceSink | None = None
        self.active = False
        self._planes: dict[int, tuple[int, int]] = {}
        self._side: torch.cuda.Stream | None = None
        self._dirty = False
        self._header_address = self.header.data_ptr()
        self._num_identity = 0
        self._anchors: dict[torch.dtype, torch.Tensor] = {}

    @property
    def num_graph_nodes(self) -> int:
        return self.switch.num_nodes

    @property
    def staging_bytes(self) -> int:
        return self.slabs.held_bytes

    def _is_quiet(self) -> bool:
        return self.main is None or bool(self.main.query())

    def anchor(self, dtype: torch.dtype) -> torch.Tensor:
        """Return a device pointer of a dtype from which destinations are counted; see `kernel`."""
        if dtype not in self._anchors:
            self._anchors[dtype] = torch.empty(16, dtype=dtype, device=self.header.device)
        return self._anchors[dtype]

    def side_stream(self) -> torch.cuda.Stream:
        """Return the stream on which rows leave the device."""
        if self._side is None:
            self._side = torch.cuda.Stream(self.header.device)
        return self._side

    def switch_on(self, sink: DeviceSink, planes: dict[int, tuple[int, int]]) -> None:
        """Let the taps in `planes` {index: (plane, mode)} through, in graphs and outside."""
        if planes != self._planes:
            table = np.full(tuple(self.table.shape), -1, np.int32)
            if planes:
                table[[index - self.first_tap for index in planes]] = list(planes.values())
            self.table.copy_(torch.from_numpy(table))
            self._planes = planes
        self.counts.zero_()
        self.sink = sink
        self.switch.turn(frozenset(planes))

    def switch_off(self) -> None:
        """Let nothing through."""
        self.clear()
        self.sink = None
        self.switch.turn(frozenset())

    def counted(self) -> list[int]:
        """Return how many steps went through each tap that is on, and those before it; waits for the device."""
        return list(self.counts[: max(self._planes, default=self.first_tap) - self.first_tap + 1].tolist())

    def arm(self, header: Sequence[int], selection: Selection, stream: torch.cuda.Stream) -> None:
        """Send the header of a step to the device, and its row map unless the device has it already."""
        num_tokens = header[0]
        if not (selection.is_everything and num_tokens <= self._num_identity):
            pinned = torch.empty(num_tokens, dtype=torch.int32, pin_memory=True)
            pinned.numpy()[:] = selection.row_map
            # PyTorch keeps pinned memory until the copies out of it are done.
            self.row_map[:num_tokens].copy_(pinned, non_blocking=True)
            self._num_identity = num_tokens if selection.is_everything else 0
        cuda.write_words(self._header_address, header, stream.cuda_stream)
        self.active = self._dirty = True

    def clear(self) -> None:
        self.active = False
        if self._dirty:
            self.header[:1].zero_()
            self._dirty = False


class _Lane:
    """One stream's way into its block: its taps, its staging, and where the current step goes."""

    def __init__(self, stream: Stream, taps: list[Tap], max_rows: int, small_rows: int) -> None:
        self.stream, self.taps = stream, taps
        self.number = STREAM_NUMBERS[stream.name]
        self.plane_of = {tap.index: plane for plane, tap in enumerate(taps)}
        self.wide = max_rows * stream.row_bytes >= WIDE_PLANE_BYTES
        self.rows = Ring(2 * (small_rows if self.wide else max_rows))
        self.staging = 0
        self.start = 0
        self.target = 0

    @property
    def pitch(self) -> int:
        """Bytes from plane to plane in the staging."""
        return self.rows.capacity * self.stream.row_bytes

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging."""
        return len(self.taps) * self.pitch


class DeviceSink:
    """Staging of one capture, from its start to its end. `staging` is "auto", "staged" or "direct".

    Raises:
        BudgetError: "staged" was asked for, and the device has no room for it.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        taps: Mapping[tuple[str, int], Tap],
        rows: DeviceRows,
        pool: SegmentPool,
        max_rows: int,
        graph_rows: int,
        staging: str,
    ) -> None:
        self._rows, self._pool = rows, pool
        self._device = rows.header.device
        self._small_rows = max(graph_rows, MIN_STAGED_ROWS)
        self._num_steps = 0
        self._num_rows = 0
        self._is_large = False
        self._side = rows.side_stream()
        self._last = torch.cuda.Event()
        self._labels = Ring(2 * max_rows)
        self._label_start = self._label_target = 0
        self._step: tuple[Selection, Batch] | None = None
        self._forward_done = torch.cuda.Event()
        self._unsent = False
        self._lanes = [
            _Lane(stream, [taps[stream.name, layer] for layer in stream.layers], max_rows, self._small_rows)
            for stream in streams
        ]
        names = [stream.name for stream in streams]
        if len(set(names)) < len(names):
            raise EngineUnsupportedError(
                f"layers of one stream differ in width here ({names}): capture them separately."
            )
        self._lane_of = {tap.index: lane for lane in self._lanes for tap in lane.taps}
        widest = max((max_rows * lane.stream.row_bytes for lane in self._lanes if lane.wide), default=0)
        self._planes = Ring(RING_PLANES * aligned(widest))
        self._slab = None if staging == "direct" else self._take_slab(staging)
        rows.switch_on(
            self, {tap.index: (plane, tap.mode) for lane in self._lanes for plane, tap in enumerate(lane.taps)}
        )

    def _take_slab(self, staging: str) -> Slab | None:
        sizes = [8 * self._labels.capacity, self._planes.capacity, *(lane.staging_bytes for lane in self._lanes)]
        needed = sum(aligned(size) for size in sizes)
        slab = self._rows.slabs.take(needed)
        if slab is None:
            free, total = torch.cuda.mem_get_info(self._device)
            text = (
                f"staging rows needs {needed / 2**20:.0f} MiB of GPU memory; {free / 2**20:.0f} of "
                f"{total / 2**20:.0f} MiB are free, of which the engine's own steps may take "
                f"{self._rows.headroom() / 2**20:.0f}: capture fewer layers, start the engine with a lower "
                'gpu_memory_utilization, or use staging="direct".'
            )
            if staging == "staged":
                raise BudgetError(text, needed_bytes=needed, free_bytes=free)
            logger.warning("vllm-tap: %s Going on with direct writes, which are slower for many rows.", text)
            return None
        self._label_staging, self._plane_staging, *parts = [slab.part(size) for size in sizes]
        for lane, part in zip(self._lanes, parts, strict=True):
            lane.staging = part
        return slab

    def begin(self, chunk: Block, placed: Layout[int], selection: Selection, batch: Batch) -> None:
        """Tell the kernels where the rows of this step go.

        Cost: one copy of 128 bytes to the device; of the row map too when it changes.
        """
        self.send()
        main = self._rows.main = torch.cuda.current_stream(self._device)
        address = self._pool.segment(chunk.segment_id).address
        num_rows = self._num_rows = selection.num_rows
        self._is_large = num_rows > self._small_rows
        header = [0] * kernel.HEADER_WORDS
        header[0] = len(selection.row_map)
        for lane, start in zip(self._lanes, placed.streams, strict=True):
            lane.target = address + start
            header[1 + 2 * lane.number : 3 + 2 * lane.number] = self._way(lane, main)
        self._rows.arm(header, selection, main)
        self._label_target = address + placed.labels
        self._step = selection, batch

    def _way(self, lane: _Lane, main: torch.cuda.Stream) -> tuple[int, int]:
        """Return where plane 0 of a stream begins in this step, and the bytes from plane to plane."""
        row_bytes = lane.stream.row_bytes
        if self._slab is None:
            return lane.target, self._num_rows * row_bytes
        if lane.wide and self._is_large:
            return 0, 0  # each tap takes its own place in the ring, see `address_for`
        lane.start = lane.rows.take(self._num_rows, main)
        return lane.staging + lane.start * row_bytes, lane.pitch

    def _label(self, main: torch.cuda.Stream) -> None:
        # After the forward pass has been launched, where the host's time is not on the engine's path. The runner's
        # positions and token ids stay as they are until it prepares the next step, on the same stream.
        assert self._step is not None
        selection, batch = self._step
        self._step = None
        num_rows = selection.num_rows
        ctypes.memmove(self._label_target, selection.numbers.ctypes.data, 4 * num_rows)
        self._label_target += 4 * num_rows
        address, pitch = self._label_target, num_rows
        if self._slab is not None:
            self._label_start = self._labels.take(num_rows, main)
            address, pitch = self._label_staging + 4 * self._label_start, self._labels.capacity
        kernel.launch_labels(self._rows, batch.positions, batch.token_ids, address, pitch, len(selection.row_map))

    def wants(self, tap: Tap) -> bool:
        """Tell whether this capture takes the rows of a tap."""
        return tap.index in self._lane_of

    def address_for(self, tap: Tap) -> int:
        """Return where a tap outside graphs writes its plane, or 0 for where the header says."""
        lane = self._lane_of[tap.index]
        if self._slab is None or not (lane.wide and self._is_large):
            return 0
        nbytes = self._num_rows * lane.stream.row_bytes
        lane.start = self._planes.take(aligned(nbytes), torch.cuda.current_stream(self._device))
        return self._plane_staging + lane.start

    def send_plane(self, tap: Tap) -> None:
        """Queue the copy of a plane that has just been written to the ring."""
        lane = self._lane_of[tap.index]
        nbytes = self._num_rows * lane.stream.row_bytes
        self._side.wait_event(torch.cuda.current_stream(self._device).record_event())
        target = lane.target + lane.plane_of[tap.index] * nbytes
        cuda.copy_to_host(target, self._plane_staging + lane.start, nbytes, self._side.cuda_stream)
        self._planes.busy(lane.start, aligned(nbytes), self._side.record_event())

    def end(self) -> list[Tap]:
        """Write the labels; which taps were silent is known when all is settled."""
        self._num_steps += 1
        self._rows.active = False
        main = torch.cuda.current_stream(self._device)
        self._label(main)
        self._forward_done.record(main)
        self._unsent = True
        return []

    def send(self) -> None:
        """Queue the copies of the staged planes and the labels on the side stream."""
        if not self._unsent:
            return
        self._unsent = False
        if self._slab is None:
            self._last = self._forward_done
            return
        num_rows, side = self._num_rows, self._side.cuda_stream
        self._side.wait_event(self._forward_done)
        staged = [lane for lane in self._lanes if not (lane.wide and self._is_large)]
        for lane in staged:
            width = num_rows * lane.stream.row_bytes
            source = lane.staging + lane.start * lane.stream.row_bytes
            cuda.copy_planes_to_host(lane.target, width, source, lane.pitch, width, len(lane.taps), side)
        source, pitch = self._label_staging + 4 * self._label_start, 4 * self._labels.capacity
        cuda.copy_planes_to_host(self._label_target, 4 * num_rows, source, pitch, 4 * num_rows, NUM_LABELS - 1, side)
        self._last = self._side.record_event()
        for lane in staged:
            lane.rows.busy(lane.start, num_rows, self._last)
        self._labels.busy(self._label_start, num_rows, self._last)

    def settle(self) -> None:
        """Wait for the last copy, and make sure that every step went through every tap.

        Raises:
            CaptureError: A tap was silent.
        """
        self.send()
        self._last.synchronize()
        seen = self._rows.counted()
        silent = [place for place in self._lane_of if seen[place - self._rows.first_tap] != self._num_steps]
        if silent:
            tap = REGISTRY[silent[0]]
            raise CaptureError(
                f"{len(silent)} taps saw another number of steps than the {self._num_steps} of this capture; the first "
                f"is {tap.stream}[{tap.layer}] with {seen[tap.index - self._rows.first_tap]}: this model or step runs "
                "its layers in a way that cannot be tapped. Set enforce_eager=True, and report the model."
            )

    def close(self) -> None:
        """Switch the taps off and give the staging memory back."""
        self._rows.switch_off()
        # Blocks may be freed and segments unmapped after this: nothing may be on its way into them.
        self.send()
        self._last.synchronize()
        if self._slab is not None:
            self._rows.slabs.give(self._slab)
            self._slab = None


def register_segment(segment: Segment) -> None:
    """Pin a segment, so that copies into it run at the full rate of the bus and kernels may store into it."""
    code = int(torch.cuda.cudart().cudaHostRegister(segment.address, segment.nbytes, 0))
    if code:
        raise BudgetError(f"{segment.nbytes} bytes of host memory cannot be pinned (cudaHostRegister: {code})")


def unregister_segment(segment: Segment) -> None:
    """Undo `register_segment`."""
    torch.cuda.cudart().cudaHostUnregister(segment.address)


_by_pointer: dict[int, Tap] = {}


def _tap_cuda(hidden: torch.Tensor, residual: torch.Tensor | None, control: torch.Tensor) -> None:
    tap = _by_pointer.get(control.data_ptr()) or _find(control)
    hidden, residual = flat(hidden), flat(residual)  # type: ignore[assignment]
    rows: DeviceRows = tap.rows  # type: ignore[assignment]
    place = tap.index - rows.first_tap, STREAM_NUMBERS[tap.stream]
    if torch.cuda.is_current_stream_capturing():
        assert tap.dtype is not None
        kernel.launch_tap(rows, hidden, residual, *place, tap.dtype, ahead=True)
        rows.switch.note(tap.index, torch.cuda.current_stream(hidden.device).cuda_stream)
        return
    if not tap.width or tap.keep_probe:
        tap.observe(hidden, residual)
        assert tap.dtype is not None
        # Now, because nothing can be compiled or loaded while a stream is captured.
        kernel.warm(rows, hidden, residual, *place, tap.dtype)
    if rows.active and rows.sink is not None and rows.sink.wants(tap):
        assert tap.dtype is not None
        address = rows.sink.address_for(tap)
        kernel.launch_tap(rows, hidden, residual, *place, tap.dtype, address=address)
        if address:
            rows.sink.send_plane(tap)


def _find(control: torch.Tensor) -> Tap:
    tap = next((t for t in REGISTRY if t.control.data_ptr() == control.data_ptr()), None)
    if tap is None:
        raise CaptureError("a tap's control word was cloned by the compiler: report this model")
    _by_pointer[control.data_ptr()] = tap
    return tap


def install() -> None:
    """Register the CUDA implementation of the tap, once per process."""
    if not _by_pointer and not _installed:
        LIBRARY.impl("tap", _tap_cuda, "CUDA")
        _installed.append(True)


_installed: list[bool] = []
