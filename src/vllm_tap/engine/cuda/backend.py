"""Rows of a CUDA engine: kernels in its graphs, staging on its device, pinned segments. Worker process."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final

import torch

from vllm_tap.engine.capture.profile import Profile
from vllm_tap.engine.cuda import driver, operator
from vllm_tap.engine.cuda.deferred_experts import DeferredExperts
from vllm_tap.engine.cuda.profile import DmaProfile
from vllm_tap.engine.cuda.rows import DeviceRows
from vllm_tap.engine.cuda.sink import DeviceSink, Sizes
from vllm_tap.engine.model.tap import Taps
from vllm_tap.errors import BudgetError, EngineUnsupportedError
from vllm_tap.frame.layout import Stream
from vllm_tap.transport.segment.memory import Segment
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.vllm import runner as vllm_runner

MAX_TAPS: Final = 4096
"""Taps that the device tables have room for, at 12 bytes each and for each group."""

MAX_PADDING: Final = 1024
"""Rows that a step may have beyond the runner's max_num_tokens."""

SEGMENT_BYTES: Final = 1 << 30


class DeviceBackend:
    """Taps write to staging, from which a side stream copies into segments."""

    def __init__(self, worker: Any, step_lock: AbstractContextManager[Any]) -> None:
        operator.install()
        runner, self._device = worker.model_runner, worker.device
        self._sizes = Sizes(
            vllm_runner.max_rows(worker), vllm_runner.graph_rows(worker), vllm_runner.request_rows(worker)
        )
        reference = weakref.ref(worker)  # taps, and what they know, stay until the process ends

        def headroom() -> int:
            owner = reference()
            return vllm_runner.step_headroom(owner) if owner is not None else 0

        max_rows, graph_rows = self._sizes.max_rows + MAX_PADDING, self._sizes.graph_rows
        self.rows = DeviceRows(max_rows, MAX_TAPS, worker.device, headroom, step_lock)
        self.rows.experts = DeferredExperts(self.rows, graph_rows)
        vllm_runner.around_capture(runner, self.rows.switch.keeping)

    @property
    def refusal(self) -> str:
        """Why the kernels do not run here, or an empty string."""
        return self.rows.refusal

    def new_sink(
        self, streams: Sequence[Stream], taps: Taps, modes: Mapping[str, int], pool: SegmentPool, staging: str
    ) -> DeviceSink:
        """Return a sink, whose staging is taken from the device now.

        Raises:
            CaptureError: As many captures are under way as there is room for.
            EngineUnsupportedError: The kernels do not run here.
        """
        if self.rows.refusal:
            raise EngineUnsupportedError(self.rows.refusal)
        return DeviceSink(streams, taps, modes, self.rows, pool, self._sizes, staging)

    def new_pool(self, shared: bool) -> SegmentPool:
        """Return a pool whose segments are pinned."""
        return SegmentPool(
            0, shared=shared, segment_bytes=SEGMENT_BYTES, on_create=self._register, on_close=self._unregister
        )

    def _register(self, segment: Segment) -> None:
        # In whichever thread made it: a new one works on device 0, where a call would make a context.
        torch.cuda.set_device(self._device)
        register_segment(segment)

    def _unregister(self, segment: Segment) -> None:
        torch.cuda.set_device(self._device)
        unregister_segment(segment)

    def is_quiet(self) -> bool:
        """Tell whether the engine's stream has nothing to do."""
        return self.rows.is_quiet()

    def note_stream(self) -> None:
        """Note on which stream the engine works; in the engine's own thread."""
        self.rows.main = torch.cuda.current_stream(self._device)

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Queue what another thread does on the engine's stream."""
        with self.rows.on_stream():
            yield

    def watch(self, profile: Profile) -> None:
        """Time what a start and a finish ask of the device."""
        profile.watch(self.rows, "switch_on", "start: switch on")
        profile.watch(self.rows.slabs, "take", "start: take slab")
        profile.watch(self.rows.slabs, "give", "finish: give slab")
        profile.watch(operator, "_pass", "tap outside graphs")
        profile.watch(operator, "_pass_experts", "taps of experts outside graphs")
        profile.watch(driver, "instantiate", "graph: instantiate")
        profile.watch(driver, "destroy_executable", "graph: give up")
        profile.watch(driver, "allocate")
        profile.watch(driver, "free")

    def copy_profile(self) -> Profile:
        """Time every copy to the host."""
        return DmaProfile()


def register_segment(segment: Segment) -> None:
    """Pin a segment, so that copies into it run at the full rate of the bus and kernels may store into it."""
    code = int(torch.cuda.cudart().cudaHostRegister(segment.address, segment.nbytes, 0))
    if code:
        _take_back_error()
        raise BudgetError(f"{segment.nbytes} bytes of host memory cannot be pinned (cudaHostRegister: {code})")


def unregister_segment(segment: Segment) -> None:
    """Undo `register_segment`."""
    if int(torch.cuda.cudart().cudaHostUnregister(segment.address)):
        _take_back_error()


def _take_back_error() -> None:
    """Have the runtime forget a call that failed in this thread.

    It remembers one until it is asked, which PyTorch does after every launch: the engine's next kernel in this thread
    would be said to have failed. So one is launched for which that does not matter.
    """
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
