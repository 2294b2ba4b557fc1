"""The sink of a CUDA engine: staging on the device, drained by a side stream into pinned segments.

Runs in the worker process. Three ways lead from a tap into the block of the step, chosen per stream and step:

- staged: the whole block of the step, as it will lie in the segment, in one copy after the forward pass, which small
  steps share (see `burst`); the way of decode steps, whose taps run inside captured graphs.
- by planes: each plane copied as soon as its layer is through; the way of large prefill steps, which run outside
  graphs: the copies hide behind the layers that follow, and little memory is needed.
- direct: the tap stores into pinned host memory; no device memory at all.

Every reuse of staging is ordered between streams; the host never waits in a step.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch

from vllm_tap.engine.capture.interfaces import Settling
from vllm_tap.engine.capture.selection import Selection
from vllm_tap.engine.cuda import driver, kernel
from vllm_tap.engine.cuda.burst import Burst, Transfer
from vllm_tap.engine.cuda.plan import Copy, Lane, Plan, new_plan
from vllm_tap.engine.cuda.ring import Ring
from vllm_tap.engine.cuda.rows import DeviceRows
from vllm_tap.engine.cuda.slab import ALIGNMENT, Slab, aligned
from vllm_tap.engine.model.tap import ADD, REGISTRY, Tap
from vllm_tap.errors import BudgetError, CaptureError, EngineUnsupportedError
from vllm_tap.frame.layout import LABEL_BYTES, Layout, Stream
from vllm_tap.labels import NUM_LABELS
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.vllm.runner import Batch

logger = logging.getLogger("vllm_tap")

WIDE_PLANE_BYTES: Final = 16 << 20
"""A plane of a full step at least this large goes plane by plane: below about 1 MiB a copy loses a third of its rate,
and every copy costs the host about 20 microseconds."""

MIN_STAGED_ROWS: Final = 512

BURST_BYTES: Final = 32 << 20
"""Most bytes of steps that leave together; `burst` says what is gained. At the end of a capture one takes 0.6 ms at
55 GB/s."""

DEPTHS: Final = ((4, 2), (2, 1))
"""Planes in the staging of planes, and steps in that of blocks. The second pair is for a device that is short of
memory: a step waits then, on the device, for copies of the one before."""


class Sizes(NamedTuple):
    """The most rows of a step, of one that runs in CUDA graphs, and of a request in one that reads no prompt."""

    max_rows: int
    graph_rows: int
    request_rows: int


class DeviceSink:
    """Staging of one capture, from its start to its end. `staging` is "auto", "staged" or "direct".

    Raises:
        BudgetError: "staged" was asked for, and the device has no room for it.
        CaptureError: As many captures are under way as there is room for.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        taps: Mapping[tuple[str, int], Tap],
        modes: Mapping[str, int],
        rows: DeviceRows,
        pool: SegmentPool,
        sizes: Sizes,
        staging: str,
    ) -> None:
        max_rows = sizes.max_rows
        names = [stream.name for stream in streams]
        if len(set(names)) < len(names):
            raise EngineUnsupportedError(
                f"layers of one stream differ in width here ({names}): capture them separately."
            )
        self._rows, self._pool = rows, pool
        self._device = rows.device
        self._small_rows = max(sizes.graph_rows, MIN_STAGED_ROWS)
        self._request_rows = sizes.request_rows
        self._num_steps = 0
        self._num_counted = -1  # when counts were last asked for
        self._seen = np.empty(0, np.int32)
        self._num_rows = self._num_requests = 0
        self._is_large = False
        self._side = rows.side_stream()
        self._plan: Plan | None = None
        self._inputs: tuple[torch.Tensor, ...] = ()
        self._main = torch.cuda.current_stream(self._device).cuda_stream
        self._unsent = False
        self._unprepared = False
        self._burst: Burst | None = None
        self._chunk: Block | None = None
        self._segment = 0  # address of the one that has the chunk
        self._told = 0  # where the header that the device has says that a block begins
        self._lanes: dict[str, Lane] = {}
        self._place_of: dict[int, tuple[Lane, int]] = {}
        on: dict[int, tuple[int, int]] = {}
        step_bytes = NUM_LABELS * LABEL_BYTES * max_rows + 2 * ALIGNMENT
        for stream in streams:
            wide = max_rows * stream.row_bytes >= WIDE_PLANE_BYTES
            lane = self._lanes[stream.name] = Lane(stream.row_bytes, len(stream.layers), wide)
            step_rows = self._small_rows if wide else max_rows
            step_bytes += lane.num_planes * lane.row_bytes * step_rows + stream.alignment + ALIGNMENT
            for plane, layer in enumerate(stream.layers):
                tap = taps[stream.name, layer]
                self._place_of[tap.index] = lane, plane
                # One of the taps writes the labels: a kernel of their own would be one more launch in every step.
                labels = 0 if on else kernel.LABELS
                on[tap.index] = plane, modes.get(stream.name, ADD) | labels
        rows.require_place(on)
        plane_bytes = aligned(max((max_rows * lane.row_bytes for lane in self._lanes.values() if lane.wide), default=0))
        self._planes, self._steps = Ring(0, rows.events), Ring(0, rows.events)
        self._slab = None if staging == "direct" else self._take_slab(plane_bytes, aligned(step_bytes), staging)
        rows.slabs.keep()
        try:
            self._group = rows.switch_on(self, on)
        except Exception:
            rows.slabs.give(self._slab)
            raise

    def _take_slab(self, plane_bytes: int, step_bytes: int, staging: str) -> Slab | None:
        events = self._rows.events
        for num_planes, num_steps in DEPTHS:
            planes, steps = num_planes * plane_bytes, num_steps * step_bytes
            slab = self._rows.slabs.take(planes + steps)
            if slab is not None:
                self._planes, self._steps = Ring(planes, events), Ring(steps, events)
                self._plane_staging, self._step_staging = slab.part(planes), slab.part(steps)
                return slab
        free, total = torch.cuda.mem_get_info(self._device)
        text = (
            f"staging rows needs at least {(planes + steps) / 2**20:.0f} MiB of GPU memory; {free / 2**20:.0f} of "
            f"{total / 2**20:.0f} MiB are free, of which the engine's own steps may take "
            f"{self._rows.headroom() / 2**20:.0f}: capture fewer layers, start the engine with a lower "
            'gpu_memory_utilization, or use staging="direct".'
        )
        if staging == "staged":
            raise BudgetError(text, needed_bytes=planes + steps, free_bytes=free)
        logger.warning("vllm-tap: %s Going on with direct writes, which are slower for many rows.", text)
        return None

    def before_forward(self, chunk: Block, start: int, form: Layout[int], selection: Selection, batch: Batch) -> None:
        """Tell the kernels where the rows and the labels of this step go.

        Cost: one copy of 160 bytes to the device; of the selection too when it changes.

        Raises:
            CaptureError: The runner's positions or token ids are of another dtype than the kernel reads.
        """
        if chunk is not self._chunk:
            self._chunk, self._segment = chunk, self._pool.segment(chunk.segment_id).address
        block, burst, plan = self._segment + start, self._burst, self._plan
        if plan is None or plan.selection is not selection or plan.form is not form:
            plan = self._new_plan(selection, form, batch)
        staged = burst.join(block, form.end) if burst is not None and plan.is_whole else 0
        if staged:
            sources = [staged]
        else:
            # In the steps that join a burst, the runner's buffers and its stream are those of the first.
            if not plan.reads(batch):
                plan = self._new_plan(selection, form, batch)
            sources = self._open(plan, block, self._segment + chunk.offset + chunk.nbytes)
            for lane, begin in plan.by_planes:
                lane.target = block + begin
        self._group.tell(plan.header_for(sources), selection, self._main)
        self._told = sources[0]
        self._unsent = True
        self._inputs = batch.positions, batch.token_ids  # the header has their addresses

    def repeat(self, start: int) -> bool:
        """Do the step before once more at another place of its chunk, if it can join the burst of that.

        Cost: one copy of 16 bytes to the device.
        """
        burst, plan = self._burst, self._plan
        if burst is None or plan is None:
            return False
        staged = burst.join(self._segment + start, plan.form.end)
        if staged:
            self._group.tell_again(staged - self._told, self._main)
        return staged > 0

    def _new_plan(self, selection: Selection, form: Layout[int], batch: Batch) -> Plan:
        # Steps that take the same rows and read the same buffers of the runner run on the same stream.
        main = self._rows.main = torch.cuda.current_stream(self._device)
        self._main = main.cuda_stream
        self._num_rows = selection.num_rows
        self._is_large = selection.num_rows > self._small_rows
        self._num_requests = len(batch.request_ids)
        # Before that, the next step has prompts again, and the time that a graph takes is taken from its launch.
        self._unprepared = selection.ends_prompts
        numbers = self._group.tables.numbers.data_ptr()
        self._plan = new_plan(selection, form, batch, numbers, self._lanes, self._lane_goes_by_planes)
        return self._plan

    def _open(self, plan: Plan, block: int, chunk_end: int) -> list[int]:
        """Return where the kernels write each copy of a step that joins no burst: to the staging, or to the segment."""
        if self._burst is not None:
            self._flush()
        if self._slab is None:
            return [block + copy.begin for copy in plan.copies]
        copies, limit = plan.copies, 0
        if plan.is_whole:
            (only,) = copies
            # Half of the ring: another burst fills while this one is on its way.
            room = min(BURST_BYTES, chunk_end - block, self._steps.capacity // 2 - ALIGNMENT)
            limit = block + max(room, only.end)
            copies = [Copy(0, limit - block)]
        size, places = 0, []
        for copy in copies:
            # As in the segment, modulo the alignment.
            place = size + (block + copy.begin) % ALIGNMENT
            places.append(place)
            size = aligned(place + copy.end - copy.begin)
        start = self._steps.take(size, self._main)
        sources = [self._step_staging + start + place for place in places]
        transfers = [
            Transfer(block + copy.begin, source, copy.end - copy.begin)
            for copy, source in zip(plan.copies, sources, strict=True)
        ]
        self._burst = Burst(transfers, start, size, limit)
        return sources

    def _lane_goes_by_planes(self, lane: Lane) -> bool:
        return self._slab is not None and lane.wide and self._is_large

    def wants(self, tap: Tap) -> bool:
        """Tell whether this capture takes the rows of a tap."""
        return tap.index in self._place_of

    def goes_by_planes(self, tap: Tap) -> bool:
        """Tell whether the plane of a tap leaves as soon as its layer is through, in this step."""
        return self._lane_goes_by_planes(self._place_of[tap.index][0])

    def send_plane(self, tap: Tap, write: Callable[[int], None]) -> None:
        """Have the plane of a tap written to an address in the ring, and queue the copy of it."""
        lane, plane = self._place_of[tap.index]
        nbytes = self._num_rows * lane.row_bytes
        stream = torch.cuda.current_stream(self._device).cuda_stream
        place = self._planes.take(aligned(nbytes), stream)
        source = self._plane_staging + place
        write(source)
        self._let_side_follow(stream)
        driver.copy_to_host(lane.target + plane * nbytes, source, nbytes, self._side)
        self._planes.release_after(place, aligned(nbytes), self._side)

    def after_forward(self) -> list[Tap]:
        """Take note of a step; which taps were silent is known when all is settled.

        Raises:
            TapError: What went wrong in a tap of this step.
        """
        if self._group.failure is not None:
            raise self._group.failure  # rows of this step may be on their way: `close` waits for them
        self._num_steps += 1
        self._group.active = False
        return []

    def clear(self) -> None:
        """Let no row through."""
        self._group.clear()

    def after_sampling(self, generates: bool) -> None:
        """Queue the copies of what is staged on the side stream, unless later steps may still join them.

        Of the graphs that later steps will replay, make one ready if there is one to make: takes some milliseconds.
        """
        if self._burst is not None and self._burst.is_full:
            self._flush()
        if generates and self._unprepared:
            self._unprepared = self._rows.switch.prepare(self._num_requests * self._request_rows)

    def _flush(self) -> None:
        """Queue the copies of what is staged, behind all that the engine has queued."""
        if not self._unsent:
            return
        self._unsent = False
        burst, self._burst = self._burst, None
        self._let_side_follow(self._main)
        if burst is not None:
            for target, source, nbytes in burst.copies:
                driver.copy_to_host(target, source, nbytes, self._side)
            self._steps.release_after(burst.place, burst.size, self._side)

    def _let_side_follow(self, stream: int) -> None:
        """Let what is queued on the side stream from here on wait for what is queued on another."""
        self._rows.passed.record(stream)
        self._rows.passed.wait(self._side)

    def _wait_for_side(self) -> None:
        self._rows.passed.record(self._side)
        self._rows.passed.synchronize()

    def on_idle(self) -> None:
        """Queue the copies of what is staged, and that of what the taps have counted, behind all queued steps."""
        self._flush()
        if self._num_counted != self._num_steps:
            self._let_side_follow(self._main)
            self._seen = self._group.send_counts(self._side)
            self._num_counted = self._num_steps

    def synchronize(self) -> None:
        """Wait for the last copy, and make sure that every step went through every tap.

        Raises:
            CaptureError: A tap was silent.
        """
        self.on_idle()
        self._wait_for_side()
        self._check(self._num_counted)

    def queued(self) -> Settling:
        """Queue the copies of what is staged.

        The wait is behind all steps that are queued now, and holds up none that come later.
        """
        self.on_idle()
        event, num_steps = self._rows.settled.recorded(self._side), self._num_counted

        def wait() -> None:
            event.synchronize()
            self._rows.settled.give(event)

        return Settling(wait, lambda: self._check(num_steps))

    def _check(self, num_steps: int) -> None:
        """Make sure that every tap has counted so many steps, or some of those more that were launched since.

        Steps that follow do not wait for the copy of the counts. Nobody launches one meanwhile.
        """
        seen = {place: int(self._seen[place - self._rows.first_tap]) for place in self._place_of}
        silent = [place for place, count in seen.items() if not num_steps <= count <= self._num_steps]
        if silent:
            tap = REGISTRY[silent[0]]
            raise CaptureError(
                f"{len(silent)} taps saw another number of steps than the {num_steps} of this capture; the first "
                f"is {tap.stream}[{tap.layer}] with {seen[silent[0]]}: this model or step runs "
                "its layers in a way that cannot be tapped. Set enforce_eager=True, and report the model."
            )

    def close(self) -> None:
        """Switch the taps off and give the staging memory back."""
        self._rows.switch_off(self._group)
        # Blocks may be freed and segments unmapped after this: nothing may be on its way into them.
        self._flush()
        self._wait_for_side()
        for ring in (self._planes, self._steps):
            ring.close()
        self._rows.slabs.give(self._slab)
        self._slab = None
