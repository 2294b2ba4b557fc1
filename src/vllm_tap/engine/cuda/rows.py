"""The rows of a step on a CUDA engine: groups, graphs, staging memory and streams. Runs in the worker process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final, Protocol

import torch

from vllm_tap.engine.cuda import driver
from vllm_tap.engine.cuda.graphs import GraphSwitch
from vllm_tap.engine.cuda.group import DeviceGroup, PlaneTaker
from vllm_tap.engine.cuda.slab import SlabKeeper
from vllm_tap.engine.cuda.tables import new_tables
from vllm_tap.engine.cuda.tapped_graph import NOTHING, Wanted
from vllm_tap.engine.model.tap import REGISTRY, Rows, Tap
from vllm_tap.errors import CaptureError, EngineUnsupportedError

logger = logging.getLogger("vllm_tap")

FULL: Final = (
    "{} captures are under way in this engine, as many as a GPU engine serves at a time: finish or stop one of them, "
    "or capture the prompts of several together."
)


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


class DeviceRows(Rows[DeviceGroup]):
    """Resources that the taps of an engine share, held as long as the model is.

    Attributes:
        tables: Of the first group: what kernels in graphs are given, which go on to the others.
        on: The taps that captures under way want, for graphs.
        refusal: Why the kernels do not run here, or an empty string.
        events: For sinks, one after the other.
        passed: Recorded and waited for at once.
        settled: For threads that wait while steps go on.
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
        self.device = device
        self.first_tap = len(REGISTRY)
        self.main: torch.cuda.Stream | None = None
        self.on: Wanted = NOTHING
        self._places = [
            DeviceGroup(number, tables, self) for number, tables in enumerate(new_tables(max_tokens, max_taps, device))
        ]
        self.tables = self._places[0].tables
        self.experts: ExpertHolder | None = None
        self.switch = GraphSwitch(self.fail, self._serve_experts, step_lock)
        self.headroom = headroom
        self.slabs = SlabKeeper(device, headroom, self.is_quiet, self.switch.forget, self._complete_pieces)
        self.refusal = ""
        self.events, self.passed = driver.Events(), driver.Event()
        self.settled = driver.Events(driver.SLEEPING)
        self._side: torch.cuda.Stream | None = None
        self._context = driver.current_context()

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

    def side_stream(self) -> int:
        """Return the stream on which rows leave the device."""
        if self._side is None:
            self._side = torch.cuda.Stream(self.device)
        return self._side.cuda_stream

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Queue what another thread does on the engine's stream."""
        driver.use_context(self._context)
        with torch.cuda.device(self.device), torch.cuda.stream(self.main):
            yield

    def fail(self, error: Exception) -> None:
        """Take note of what went wrong for all: the end of the captures in this step; of all, if there is none."""
        hit = [group for group in self.groups if group.active or group.failure is not None]
        for group in hit:
            group.fail(error)
        if not hit and not self.refusal:
            self.refusal = f"the taps' kernels do not run on this device ({type(error).__name__}: {error})"
            logger.warning("vllm-tap cannot capture from this engine, plain generation goes on: %s", self.refusal)

    def require_place(self, indices: Iterable[int]) -> None:
        """Refuse a capture for which there is no room in the tables.

        Raises:
            CaptureError: As many captures are under way as there is room for.
            EngineUnsupportedError: There are taps for which there is none.
        """
        if len(self.groups) == len(self._places):
            raise CaptureError(FULL.format(len(self._places)), places=len(self._places))
        num_taps = max(indices, default=self.first_tap) - self.first_tap + 1
        if num_taps > len(self.tables.table):
            raise EngineUnsupportedError(
                f"tap {num_taps} of this model is one too many: there is room for {len(self.tables.table)}. "
                "Leave out the last layers."
            )

    def switch_on(self, sink: PlaneTaker, planes: dict[int, tuple[int, int]]) -> DeviceGroup:
        """Let the taps in `planes` {index: (plane, mode)} through for a capture; return its group."""
        # The first place that is free: kernels in graphs look at no more than they need.
        group = next(place for place in self._places if place.sink is None)
        group.switch_on(sink, planes)
        self.groups.append(group)
        self._combine()
        return group

    def switch_off(self, group: DeviceGroup) -> None:
        """Let nothing more through for a capture."""
        group.switch_off()
        self.groups.remove(group)
        if self.groups:
            self._combine()

    def _combine(self) -> None:
        """Put together what graphs do for all captures; what stays the same is the same object."""
        taps = frozenset[int]().union(*(group.taps for group in self.groups))
        num_groups = max(group.number for group in self.groups) + 1
        # Powers of two: when a few captures come and go, what has been made executable serves on.
        wanted = Wanted(taps, 1 << (num_groups - 1).bit_length())
        if wanted != self.on:
            self.on = wanted

    def paused(self) -> None:
        """A group takes nothing more of this step."""
        if not any(group.active for group in self.groups):
            self.switch.on = NOTHING
