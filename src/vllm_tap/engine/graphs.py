"""Switches the taps in captured CUDA graphs off while nobody captures. Worker process, CUDA engines only.

Even a kernel that returns at once costs a graph about 2 microseconds, times the number of layers, each step. A kernel
node of an instantiated graph can be disabled for the next launches; that needs the graph itself, which PyTorch throws
away unless told to keep it. Switching happens when a graph is replayed for the first time after a change, so that
starting a capture does not touch graphs that never run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vllm_tap.engine import cuda
from vllm_tap.errors import TransportError

logger = logging.getLogger("vllm_tap")


class GraphSwitch:
    """Which taps are on, for all graphs of a worker."""

    def __init__(self) -> None:
        self.epoch = 0
        self.on: frozenset[int] = frozenset()
        self._noted: dict[int, list[tuple[int, int]]] = {}
        self.num_nodes = 0

    def note(self, tap_index: int, stream: int) -> None:
        """Remember the kernel node that a capturing stream has just recorded for a tap."""
        found = cuda.last_captured_node(stream)
        if found is not None:
            graph, node = found
            self._noted.setdefault(graph, []).append((tap_index, node))

    def take(self, graph: int) -> list[tuple[int, int]]:
        """Return (tap, node) of a graph whose capture has ended."""
        nodes = self._noted.pop(graph, [])
        self.num_nodes += len(nodes)
        return nodes

    def turn(self, on: frozenset[int]) -> None:
        """Turn on these taps and no others, from the next replay of each graph on."""
        self.on = on
        self.epoch += 1

    def set_nodes(self, graph_exec: int, nodes: list[tuple[int, int]], state: dict[int, bool]) -> None:
        """Bring the nodes [(tap, node)] of an instantiated graph to what is on; `state` {node: is on} follows."""
        for tap_index, node in nodes:
            wanted = tap_index in self.on
            if state[node] != wanted:
                cuda.set_node_enabled(graph_exec, node, wanted)
                state[node] = wanted

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Make PyTorch keep the graphs that are captured inside this block, so that their nodes can be switched."""
        original = torch.cuda.CUDAGraph
        if not hasattr(original, "raw_cuda_graph_exec"):
            logger.info("vllm-tap: this PyTorch does not hand out CUDA graphs: idle taps cost 2 microseconds each")
            yield
            return
        torch.cuda.CUDAGraph = _kept(original, self)  # type: ignore[misc]
        try:
            yield
        finally:
            torch.cuda.CUDAGraph = original  # type: ignore[misc]


def _kept(original: Any, switch: GraphSwitch) -> Any:
    class KeptGraph(original):  # type: ignore[misc]
        """A CUDA graph whose taps follow a `GraphSwitch`."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(cls, keep_graph=True)

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(keep_graph=True)
            self._tap_nodes: list[tuple[int, int]] = []
            self._tap_epoch = -1
            self._tap_state: dict[int, bool] = {}

        def capture_end(self) -> None:
            super().capture_end()
            self.instantiate()
            self._tap_nodes = switch.take(self.raw_cuda_graph())
            self._tap_state = {node: True for _, node in self._tap_nodes}

        def replay(self) -> None:
            if self._tap_epoch != switch.epoch:
                self._follow()
            super().replay()

        def _follow(self) -> None:
            self._tap_epoch = switch.epoch
            try:
                switch.set_nodes(self.raw_cuda_graph_exec(), self._tap_nodes, self._tap_state)
            except TransportError as error:
                # Left on, a tap is right and only slower: it finds the header idle.
                logger.warning("vllm-tap: taps in CUDA graphs cannot be switched off: %s", error)
                self._tap_nodes = []

    return KeptGraph
