"""Keeps taps out of captured CUDA graphs while nobody captures. Worker process, CUDA engines only.

A tap costs a graph time also while its kernel node is disabled, and an executable graph takes time to make and memory
to hold (see `graph_forms`). Therefore:

- A graph of a whole model comes in several forms: PyTorch's own, from which the taps are taken out before it is
  instantiated, and for each set of taps that captures want a copy that has these, made executable before a capture
  first replays it, and given up some time after the last one.
- What taps of experts read may stay as it is for as long as somebody holds it: then it is held, and one kernel serves
  all of these taps, at the end of the graph or where much is held. After any other tap, the next kernel starts early.
- Pieces of a model are many, and a step replays one for each layer: they are made executable with their taps when a
  capture first wants one of these, or in a pause of the engine after a capture, and stay so. A step waits for those of
  its pieces that are not ready. Taps that were on stay enabled until such a pause, for their kernels end at once.

Graphs with taps are launched past PyTorch, which would also move on the random numbers that a graph draws: a forward
pass draws none.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Final

import torch

from vllm_tap.engine.cuda import driver
from vllm_tap.engine.cuda.tapped_graph import NOTHING, GraphCopy, GraphPiece, Node, can_name_streams
from vllm_tap.errors import DeviceError

logger = logging.getLogger("vllm_tap")

FEW_TAPS: Final = 8
"""Most taps of a graph that counts as a piece of a model: those of one layer with experts, or norms behind blocks."""

YIELD_SECONDS: Final = 0.0002
"""Between pieces that are made ready ahead: whoever waits for one gets in between."""


class GraphSwitch:
    """Which taps are on, for all graphs of a worker.

    Args:
        on_failure: Called with what went wrong when a graph with taps was wanted; the graph has run without them.
        serve: Records what serves all that is `held`; what it returns is called when the capture has ended.
        step_lock: Held during each step of the engine, in which graphs are replayed.

    Attributes:
        on: The taps that captures want now.
        held: What is kept alive while a graph is captured, with the memory of the graph that it lies in.
    """

    def __init__(
        self,
        on_failure: Callable[[Exception], None],
        serve: Callable[[Sequence[Any]], Callable[[], None]],
        step_lock: AbstractContextManager[Any],
    ) -> None:
        self.on = NOTHING
        self.num_nodes = 0
        self.fail, self._serve, self._lock = on_failure, serve, step_lock
        self._copies: dict[int, weakref.WeakSet[GraphCopy]] = {}  # by how many rows pass them
        self._pieces: weakref.WeakKeyDictionary[Any, GraphPiece] = weakref.WeakKeyDictionary()  # by PyTorch's graph
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
        found = driver.last_captured_node(stream) if self._noted is not None else None
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

    def piece(self, owner: Any, graph: int, taps: list[Node]) -> GraphPiece:
        """Return a piece of the model, of which its owner holds PyTorch's graph, with the nodes of its taps."""
        piece = self._pieces[owner] = GraphPiece(owner, graph, taps, self)
        return piece

    def copied(self, owner: Any, graph: int, taps: list[Node]) -> GraphCopy:
        """Return a copy of a graph, of which its owner holds PyTorch's, with the nodes of its taps."""
        copy = GraphCopy(owner, graph, taps, self._num_rows, self)
        self._copies.setdefault(copy.num_rows, weakref.WeakSet()).add(copy)
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
        sizes = sorted(size for size, copies in self._copies.items() if copies)
        place = bisect.bisect_left(sizes, num_rows)
        try:
            for size in sizes[place : place + 1] + sizes[max(place - 1, 0) : place]:
                if any(copy.prepare(self.on) for copy in self._copies[size]):
                    return True
        except DeviceError as error:  # the step that needs it will fail with the same
            logger.debug("vllm-tap: a CUDA graph with taps could not be made ahead: %s", error)
        self._prepared = num_rows, self.on
        return False

    def forget(self) -> None:
        """Give up what was made for captures, and disable taps in pieces; the next one does it again. From any thread.

        Raises:
            DeviceError: The driver refused.
        """
        with self._lock:
            self._prepared = 0, NOTHING
            for copy in itertools.chain.from_iterable(self._copies.values()):
                copy.forget()
        with _or_left_in():
            for _, piece in self._all_pieces():
                with self._lock:
                    piece.disable()

    def complete_pieces(self, is_quiet: Callable[[], bool]) -> bool:
        """Make pieces ready for any taps while nobody captures and the device is quiet; return whether all are.

        All of Llama-3.1-8B take a second. A step that comes meanwhile waits for one of them at most. From any thread.
        """
        try:
            # Asked first: while the engine is busy, it costs no look at hundreds of pieces.
            return is_quiet() and all(self._complete(piece, is_quiet) for _, piece in self._all_pieces())
        except DeviceError as error:
            logger.info("vllm-tap: pieces of CUDA graphs are made ready when a capture wants them: %s", error)
            return True

    def _complete(self, piece: GraphPiece, is_quiet: Callable[[], bool]) -> bool:
        """Make a piece ready if there is time for it; return whether it is."""
        if piece.is_complete:
            return True
        if self.on or not is_quiet():
            return False
        with self._lock:
            if not piece.is_complete:
                piece.complete()
        time.sleep(YIELD_SECONDS)
        return True

    def _all_pieces(self) -> Iterator[tuple[Any, GraphPiece]]:
        """Yield pieces with their owners: a graph is there as long as its owner is held."""
        for reference in self._pieces.keyrefs():
            owner = reference()
            piece = self._pieces.get(owner) if owner is not None else None
            if piece is not None:
                yield owner, piece

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Make PyTorch keep the graphs that are captured inside this block, so that taps can be taken out of them."""
        original = torch.cuda.CUDAGraph
        if not (hasattr(original, "raw_cuda_graph") and can_name_streams() and driver.can_edit_graphs()):
            logger.info("vllm-tap: CUDA graphs cannot be edited here: taps stay in them while nobody captures")
            yield
            return
        torch.cuda.CUDAGraph = _kept(original, self)  # type: ignore[misc]
        try:
            yield
        finally:
            torch.cuda.CUDAGraph = original  # type: ignore[misc]


@contextmanager
def _or_left_in() -> Iterator[None]:
    """Put up with taps that stay in a graph: they are right and only slower, because they find the header idle."""
    try:
        yield
    except DeviceError as error:
        logger.warning("vllm-tap: taps stay in a CUDA graph while nobody captures: %s", error)


def _kept(original: Any, switch: GraphSwitch) -> Any:
    class KeptGraph(original):  # type: ignore[misc]
        """A CUDA graph whose taps follow a `GraphSwitch`."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(cls, keep_graph=True)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(keep_graph=True)

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
                    self.replay = switch.piece(self, graph, taps).replay
                    return
                if taps:
                    self.replay = switch.copied(self, graph, taps).replay
                    for node in taps:
                        driver.remove_node(graph, node.handle)
            self.instantiate()

    return KeptGraph
