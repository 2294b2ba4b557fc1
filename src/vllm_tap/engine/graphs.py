"""Keeps taps out of captured CUDA graphs while nobody captures. Worker process, CUDA engines only.

A tap at 8 rows costs a graph half a microsecond to one and a half, one whose kernel node is disabled still a fifth of
one (bench/tap_kernel.py, one H200), times the number of layers, each step. So a graph comes in several forms: PyTorch's
own, from which the taps are taken out before it is instantiated, and for each set of taps that captures want a copy
that has these, made executable when a capture first replays it.

Copies are launched past PyTorch, which would also move on the random numbers that a graph draws: a forward pass draws
none.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from vllm_tap.engine import cuda
from vllm_tap.errors import TransportError

logger = logging.getLogger("vllm_tap")


NOTHING: Final[frozenset[int]] = frozenset()

MOST_FORMS: Final = 4
"""Sets of taps for which a graph is kept executable."""


class GraphSwitch:
    """Which taps are on, for all graphs of a worker.

    Args:
        on_failure: Called with what went wrong when a graph with taps was wanted; the graph has run without them.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self.on = NOTHING
        self.num_nodes = 0
        self.fail = on_failure
        self._noted: list[tuple[int, int, int]] | None = None

    def begin(self) -> None:
        """A graph whose taps are to be taken out is about to be captured."""
        self._noted = []

    def note(self, tap_index: int, stream: int) -> None:
        """Remember the kernel node that a capturing stream has just recorded for a tap.

        Of graphs that are not kept, nothing: vLLM's V1 runner captures some to see how much memory they take, and the
        driver gives their handles to later ones.
        """
        found = cuda.last_captured_node(stream) if self._noted is not None else None
        if self._noted is not None and found is not None:
            self._noted.append((*found, tap_index))

    def take(self, graph: int) -> list[tuple[int, int]]:
        """Return (tap, node) of the graph whose capture has just ended."""
        nodes = [(index, node) for other, node, index in self._noted or () if other == graph]
        self._noted = None
        self.num_nodes += len(nodes)
        return nodes

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Make PyTorch keep the graphs that are captured inside this block, so that taps can be taken out of them."""
        original = torch.cuda.CUDAGraph
        if not hasattr(original, "raw_cuda_graph_exec") or not cuda.can_edit_graphs():
            logger.info("vllm-tap: CUDA graphs cannot be edited here: taps stay in them while nobody captures")
            yield
            return
        torch.cuda.CUDAGraph = _kept(original, self)  # type: ignore[misc]
        try:
            yield
        finally:
            torch.cuda.CUDAGraph = original  # type: ignore[misc]


class _Copy:
    """A graph with its taps, beside one from which they were taken out."""

    def __init__(self, graph: int, taps: list[tuple[int, int]]) -> None:
        self._graph = cuda.clone_graph(graph)
        self._nodes = [(index, cuda.node_in_clone(node, self._graph)) for index, node in taps]
        self._taps = frozenset(index for index, _ in taps)
        # Now, while the engine starts: pieces of layers have one tap each, and a step of a new size needs all of them.
        self._whole = self._edited(self._taps)
        self._forms: dict[frozenset[int], int] = {}
        self._on = NOTHING
        self._executable = 0

    def follow(self, on: frozenset[int]) -> bool:
        """Have the taps that are on and no others; return whether there are any."""
        if on is not self._on:
            wanted = on & self._taps
            self._executable = self._form(wanted) if wanted else 0
            self._on = on
        return self._executable != 0

    def _form(self, wanted: frozenset[int]) -> int:
        """Return an executable graph with these taps; when there are many, the one that was made first goes."""
        if wanted not in self._forms:
            executable = self._executable_with(wanted)
            if len(self._forms) == MOST_FORMS:
                cuda.destroy_executable(self._forms.pop(next(iter(self._forms))))
            self._forms[wanted] = executable
        return self._forms[wanted]

    def _executable_with(self, wanted: frozenset[int]) -> int:
        if wanted == self._taps:
            return cuda.instantiate(self._whole)
        graph = self._edited(wanted)
        try:
            return cuda.instantiate(graph)
        finally:
            cuda.destroy_graph(graph)

    def _edited(self, wanted: frozenset[int]) -> int:
        try:
            return self._clone_with(wanted, early=True)
        except TransportError as error:
            logger.info("vllm-tap: kernels after taps start when these have ended altogether: %s", error)
            return self._clone_with(wanted, early=False)

    def _clone_with(self, wanted: frozenset[int], early: bool) -> int:
        graph = cuda.clone_graph(self._graph)
        try:
            nodes = [(index in wanted, cuda.node_in_clone(node, graph)) for index, node in self._nodes]
            for is_wanted, node in nodes:
                if not is_wanted:
                    cuda.remove_node(graph, node)
            for is_wanted, node in nodes:
                if is_wanted and early:
                    cuda.let_next_start_early(graph, node)
        except TransportError:
            cuda.destroy_graph(graph)
            raise
        return graph

    def launch(self) -> None:
        """Queue the graph on the current stream."""
        cuda.launch_graph(self._executable, torch.cuda.current_stream().cuda_stream)


def _kept(original: Any, switch: GraphSwitch) -> Any:
    class KeptGraph(original):  # type: ignore[misc]
        """A CUDA graph whose taps follow a `GraphSwitch`."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(cls, keep_graph=True)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(keep_graph=True)
            self._with_taps: _Copy | None = None

        def capture_begin(self, *args: Any, **kwargs: Any) -> None:
            switch.begin()
            super().capture_begin(*args, **kwargs)

        def capture_end(self) -> None:
            super().capture_end()
            graph = self.raw_cuda_graph()
            taps = switch.take(graph)
            try:
                if taps:
                    self._with_taps = _Copy(graph, taps)
                for _, node in taps:
                    cuda.remove_node(graph, node)
            except TransportError as error:
                # Left in, a tap is right and only slower: it finds the header idle.
                logger.warning("vllm-tap: taps stay in a CUDA graph while nobody captures: %s", error)
            self.instantiate()

        def replay(self) -> None:
            if switch.on and self._with_taps is not None:
                try:
                    if self._with_taps.follow(switch.on):
                        self._with_taps.launch()
                        return
                except TransportError as error:
                    switch.fail(error)
            super().replay()

    return KeptGraph
