"""Keeps taps out of captured CUDA graphs while nobody captures. Worker process, CUDA engines only.

A tap at 8 rows costs a graph half a microsecond to one and a half, one whose kernel node is disabled still a fifth of
one (bench/tap_kernel.py, one H200), times the number of layers, each step. To make a graph executable takes 0.15 ms and
0.1 MiB of device memory for a piece of one layer, 17 ms and 2 MiB for a whole model (the same). Therefore:

- A graph of a whole model comes in several forms: PyTorch's own, from which the taps are taken out before it is
  instantiated, and for each set of taps that captures want a copy that has these, made executable before a capture
  first replays it, and given up some time after the last one.
- What taps of experts read may stay as it is for as long as somebody holds it: then it is held, and one kernel serves
  all of these taps, at the end of the graph or where much is held. After any other tap, the next kernel starts early.
- Pieces of a model are many, and a step replays one for each layer: they are made executable with their taps when a
  capture first wants one of these, and stay so, the taps disabled while nobody captures.

What executable graphs took of the device's memory the driver keeps for the next ones. Graphs with taps
are launched past PyTorch, which would also move on the random numbers that a graph draws: a forward pass draws none.
"""

from __future__ import annotations

import bisect
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch

from vllm_tap.engine import cuda
from vllm_tap.errors import TransportError

logger = logging.getLogger("vllm_tap")


class Node(NamedTuple):
    """A kernel node of a graph, and the taps that it serves."""

    taps: frozenset[int]
    handle: int

    def in_copy(self, graph: int) -> Node:
        """Return the same node of a copy of its graph."""
        return self._replace(handle=cuda.node_in_clone(self.handle, graph))


NOTHING: Final[frozenset[int]] = frozenset()

MOST_FORMS: Final = 4
"""Sets of taps for which a graph is kept executable."""

FEW_TAPS: Final = 4
"""Most taps of a graph that counts as a piece of a model."""


class GraphSwitch:
    """Which taps are on, for all graphs of a worker.

    Args:
        on_failure: Called with what went wrong when a graph with taps was wanted; the graph has run without them.
        serve: Records what serves all that is `held`; what it returns is called when the capture has ended.

    Attributes:
        on: The taps that captures want now.
        held: What is kept alive while a graph is captured, with the memory of the graph that it lies in.
    """

    def __init__(
        self, on_failure: Callable[[Exception], None], serve: Callable[[Sequence[Any]], Callable[[], None]]
    ) -> None:
        self.on = NOTHING
        self.num_nodes = 0
        self.fail, self._serve = on_failure, serve
        self._copies: weakref.WeakSet[_Copy] = weakref.WeakSet()
        self._lock = threading.Lock()
        self.held: list[Any] = []
        self._when_ended: list[Callable[[], None]] = []
        self._noted: list[tuple[int, Node]] | None = None
        self._num_rows = 0
        self._prepared = 0, NOTHING

    def begin(self) -> None:
        """A graph whose taps are to be taken out is about to be captured."""
        self._noted, self.held, self._when_ended = [], [], []

    def hold(self, work: Any) -> bool:
        """Hold something until it is served; return False if no graph is captured that will be kept."""
        if self._noted is None:
            return False
        self.held.append(work)
        return True

    def serve_held(self) -> None:
        """Record what serves all that is held, and let go of that: at the latest before the capture ends."""
        held, self.held = self.held, []
        try:
            self._when_ended.append(self._serve(held))
        except Exception as error:
            self.fail(error)

    def ended(self) -> None:
        """Do what the capture that has ended stood in the way of."""
        for do in self._when_ended:
            do()

    def note(self, tap_indices: Iterable[int], stream: int, num_rows: int) -> None:
        """Remember the kernel node that a capturing stream has just recorded for one tap or several.

        Of graphs that are not kept, nothing: vLLM's V1 runner captures some to see how much memory they take, and the
        driver gives their handles to later ones.

        Args:
            tap_indices: Of the taps.
            stream: That captures.
            num_rows: How many rows pass the taps in this graph.
        """
        found = cuda.last_captured_node(stream) if self._noted is not None else None
        if self._noted is not None and found is not None:
            graph, handle = found
            self._noted.append((graph, Node(frozenset(tap_indices), handle)))
            self._num_rows = num_rows

    def take(self, graph: int) -> list[Node]:
        """Return the nodes of the graph whose capture has just ended."""
        nodes = [node for other, node in self._noted or () if other == graph]
        self._noted = None
        self.num_nodes += len(nodes)
        return nodes

    def copied(self, graph: int, taps: list[Node]) -> _Copy:
        """Return a copy of a graph, with the nodes of its taps."""
        copy = _Copy(graph, taps, self._num_rows, self._lock)
        self._copies.add(copy)
        return copy

    def prepare(self, num_rows: int) -> bool:
        """Make ready what a step of so many rows will replay, then what comes after it when rows get fewer.

        To be called while the device is busy: a graph of a whole model takes some milliseconds. One graph a call;
        returns whether there may be more to do.
        """
        if not self.on:
            return True  # once a step wants taps
        if self._prepared == (num_rows, self.on):
            return False
        sizes = sorted({copy.num_rows for copy in self._copies})
        place = bisect.bisect_left(sizes, num_rows)
        near = sizes[place : place + 1] + sizes[max(place - 1, 0) : place]
        try:
            for copy in sorted(self._copies, key=lambda copy: -copy.num_rows):
                if copy.num_rows in near and copy.prepare(self.on):
                    return True
        except TransportError as error:  # the step that needs it will fail with the same
            logger.debug("vllm-tap: a CUDA graph with taps could not be made ahead: %s", error)
        self._prepared = num_rows, self.on
        return False

    def forget(self) -> None:
        """Give up what was made for captures; the next one makes it again. From any thread."""
        with self._lock:
            self._prepared = 0, NOTHING
            for copy in self._copies:
                copy.forget()

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Make PyTorch keep the graphs that are captured inside this block, so that taps can be taken out of them."""
        original = torch.cuda.CUDAGraph
        if not hasattr(original, "raw_cuda_graph") or not cuda.can_edit_graphs():
            logger.info("vllm-tap: CUDA graphs cannot be edited here: taps stay in them while nobody captures")
            yield
            return
        torch.cuda.CUDAGraph = _kept(original, self)  # type: ignore[misc]
        try:
            yield
        finally:
            torch.cuda.CUDAGraph = original  # type: ignore[misc]


class _Piece:
    """A graph of a piece of the model: executable without its taps until a capture wants one, with them from then on.

    What nobody wants is disabled there. It stays: the driver keeps the memory that executable graphs have taken.

    Args:
        graph: PyTorch's, which stays as it is.
        taps: Its nodes that serve taps.
        fail: Called with what went wrong; the graph runs nevertheless, maybe without taps that are on.
    """

    def __init__(self, graph: int, taps: list[Node], fail: Callable[[Exception], None]) -> None:
        self._graph, self._taps, self._fail = graph, taps, fail
        self._executable = _executable_with(NOTHING, graph, taps)
        self._forms = {NOTHING: self._executable}
        self._enabled: set[int] | None = None  # of the nodes, if they are there
        self._on: frozenset[int] | None = NOTHING
        weakref.finalize(self, _give_up, self._forms).atexit = False

    def launch(self, on: frozenset[int]) -> bool:
        """Queue the graph with the taps that are on."""
        if on is not self._on:
            try:
                self._switch(on)
            except TransportError as error:
                self._fail(error)
        cuda.launch_graph(self._executable, torch.cuda.current_stream().cuda_stream)
        return True

    def _switch(self, on: frozenset[int]) -> None:
        self._on = None  # unknown, until all has gone well
        wanted = _handles(self._taps, on)
        if wanted and self._enabled is None:
            every = frozenset(node.handle for node in self._taps)
            self._executable = self._forms[every] = cuda.instantiate(self._graph)
            self._enabled = set(every)
            cuda.destroy_executable(self._forms.pop(NOTHING))
        if self._enabled is not None:
            for handle in wanted ^ self._enabled:
                cuda.set_node_enabled(self._executable, handle, handle in wanted)
                self._enabled ^= {handle}
        self._on = on


class _Copy:
    """A graph with its taps, beside one from which they were taken out.

    Args:
        graph: To be copied.
        taps: Its nodes that serve taps.
        num_rows: How many rows pass them.
        lock: Held while it is launched: what it launches may be given up from another thread.
    """

    def __init__(self, graph: int, taps: list[Node], num_rows: int, lock: threading.Lock) -> None:
        self.num_rows = num_rows
        self._graph = cuda.clone_graph(graph)
        self._taps = [node.in_copy(self._graph) for node in taps]
        self._lock = lock
        self._forms: dict[frozenset[int], int] = {}
        self._on = NOTHING
        self._executable = 0
        weakref.finalize(self, _give_up, self._forms, self._graph).atexit = False

    def forget(self) -> None:
        """Give up what was made executable; the lock is held."""
        self._on, self._executable = NOTHING, 0
        while self._forms:
            cuda.destroy_executable(self._forms.popitem()[1])

    def launch(self, on: frozenset[int]) -> bool:
        """Queue the graph with the taps that are on and no others, unless it has none of them."""
        if not on:
            return False
        with self._lock:
            if on is not self._on:
                self._take_form(on)
            if self._executable:
                cuda.launch_graph(self._executable, torch.cuda.current_stream().cuda_stream)
            return self._executable != 0

    def prepare(self, on: frozenset[int]) -> bool:
        """Make ready what `launch` will queue; return whether there was anything to do."""
        with self._lock:
            return on is not self._on and self._take_form(on)

    def _take_form(self, on: frozenset[int]) -> bool:
        """Choose what to launch; return whether it had to be made."""
        wanted = _handles(self._taps, on)
        is_new = bool(wanted) and wanted not in self._forms
        self._executable = self._form(wanted) if wanted else 0
        self._on = on
        return is_new

    def _form(self, wanted: frozenset[int]) -> int:
        """Return an executable graph with these taps; when there are many, the one that was made first goes."""
        if wanted not in self._forms:
            executable = self._executable_with(wanted)
            if len(self._forms) == MOST_FORMS:
                cuda.destroy_executable(self._forms.pop(next(iter(self._forms))))
            self._forms[wanted] = executable
        return self._forms[wanted]

    def _executable_with(self, wanted: frozenset[int]) -> int:
        try:
            return _executable_with(wanted, self._graph, self._taps, out_of_the_way=True)
        except TransportError as error:
            logger.info("vllm-tap: kernels after taps start when these have ended altogether: %s", error)
            return _executable_with(wanted, self._graph, self._taps)


def _handles(taps: Iterable[Node], on: frozenset[int]) -> frozenset[int]:
    """Return the nodes that serve taps which are on."""
    return frozenset(node.handle for node in taps if node.taps & on)


def _executable_with(wanted: frozenset[int], graph: int, taps: Iterable[Node], *, out_of_the_way: bool = False) -> int:
    """Return a graph made executable with these of its nodes for taps and no others."""
    clone = cuda.clone_graph(graph)
    try:
        nodes = [(node.handle in wanted, node.in_copy(clone).handle) for node in taps]
        for is_wanted, handle in nodes:
            if not is_wanted:
                cuda.remove_node(clone, handle)
        for is_wanted, handle in nodes:
            if is_wanted and out_of_the_way:
                cuda.let_next_start_early(clone, handle)
        return cuda.instantiate(clone)
    finally:
        cuda.destroy_graph(clone)


def _give_up(forms: dict[frozenset[int], int], graph: int = 0) -> None:
    """Give up what nothing will launch any more: PyTorch's own graph is gone."""
    try:
        while forms:
            cuda.destroy_executable(forms.popitem()[1])
        if graph:
            cuda.destroy_graph(graph)
    except TransportError as error:
        logger.info("vllm-tap: a CUDA graph with taps stays in memory: %s", error)


@contextmanager
def _or_left_in() -> Iterator[None]:
    """Put up with taps that stay in a graph: they are right and only slower, because they find the header idle."""
    try:
        yield
    except TransportError as error:
        logger.warning("vllm-tap: taps stay in a CUDA graph while nobody captures: %s", error)


def _kept(original: Any, switch: GraphSwitch) -> Any:
    class KeptGraph(original):  # type: ignore[misc]
        """A CUDA graph whose taps follow a `GraphSwitch`."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(cls, keep_graph=True)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(keep_graph=True)
            self._taps: _Piece | _Copy | None = None

        def capture_begin(self, *args: Any, **kwargs: Any) -> None:
            switch.begin()
            super().capture_begin(*args, **kwargs)

        def capture_end(self) -> None:
            switch.serve_held()
            super().capture_end()
            switch.ended()
            graph = self.raw_cuda_graph()
            taps = switch.take(graph)
            with _or_left_in():
                if 0 < len(taps) <= FEW_TAPS:
                    self._taps = _Piece(graph, taps, switch.fail)
                elif taps:
                    self._taps = switch.copied(graph, taps)
                    for node in taps:
                        cuda.remove_node(graph, node.handle)
            if not isinstance(self._taps, _Piece):
                self.instantiate()

        def replay(self) -> None:
            try:
                if self._taps is not None and self._taps.launch(switch.on):
                    return
            except TransportError as error:
                switch.fail(error)
            super().replay()

    return KeptGraph
