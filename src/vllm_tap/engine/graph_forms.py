"""A captured CUDA graph and its taps: what is executable of it, with which of them. Worker process.

A tap at 8 rows costs a graph half a microsecond to one and a half, one whose kernel node is disabled still a fifth of
one (bench/tap_kernel.py, one H200), times the number of layers, each step. To make a graph executable takes 0.15 ms and
0.1 MiB of device memory for a piece of one layer, 17 ms and 2 MiB for a whole model (the same). What executable graphs
took of the device's memory the driver keeps for the next ones.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

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


class GraphPiece:
    """A graph of a piece of the model: executable without its taps at first, with them as soon as they are put in.

    `launch` does so if a capture wants one, `complete` ahead. What nobody wants is disabled there. It stays: the driver
    keeps the memory that executable graphs have taken.

    Args:
        graph: PyTorch's, which stays as it is.
        taps: Its nodes that serve taps.
        lock: Held while it is launched: another thread may make it ready.
        fail: Called with what went wrong; the graph runs nevertheless, maybe without taps that are on.
    """

    def __init__(self, graph: int, taps: list[Node], lock: threading.Lock, fail: Callable[[Exception], None]) -> None:
        self._graph, self._taps, self._lock, self._fail = graph, taps, lock, fail
        self._current_stream = _current_stream()
        self._executable = _executable_with(NOTHING, graph, taps)
        self._forms = {NOTHING: self._executable}
        self._enabled: list[bool] | None = None  # the nodes, if they are there
        self._on: frozenset[int] | None = NOTHING
        weakref.finalize(self, _give_up, self._forms).atexit = False

    def launch(self, on: frozenset[int]) -> bool:
        """Queue the graph with the taps that are on."""
        with self._lock:
            if on is not self._on:
                try:
                    self._switch(on)
                except TransportError as error:
                    self._fail(error)
            cuda.launch_graph(self._executable, self._current_stream())
        return True

    @property
    def is_complete(self) -> bool:
        """Whether its taps are there."""
        return self._enabled is not None

    def complete(self) -> None:
        """Have its taps there, before a capture wants one.

        Raises:
            TransportError: The driver refused. The graph runs nevertheless, and the next launch puts it in order.
        """
        with self._lock:
            if self._on is not None:
                self._switch(self._on, with_taps=True)

    def _switch(self, on: frozenset[int], with_taps: bool = False) -> None:
        """Have the taps that are on run and no others; put all of them in first if any is, or if asked to."""
        self._on = None  # unknown, until all has gone well
        wanted = [not node.taps.isdisjoint(on) for node in self._taps]
        if self._enabled is None and (with_taps or any(wanted)):
            every = frozenset(node.handle for node in self._taps)
            self._executable = self._forms[every] = cuda.instantiate(self._graph)
            self._enabled = [True] * len(self._taps)
            cuda.destroy_executable(self._forms.pop(NOTHING))
        if self._enabled is not None:
            for place, node in enumerate(self._taps):
                if wanted[place] != self._enabled[place]:
                    cuda.set_node_enabled(self._executable, node.handle, wanted[place])
                    self._enabled[place] = wanted[place]
        self._on = on


class GraphCopy:
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
        self._current_stream = _current_stream()
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
                cuda.launch_graph(self._executable, self._current_stream())
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


def can_name_streams() -> bool:
    """Tell whether this PyTorch has what `_current_stream` needs, which its own compiled code calls."""
    return hasattr(torch._C, "_cuda_getCurrentRawStream")


def _current_stream() -> Callable[[], int]:
    """Return what says on which stream of this device a thread queues its work.

    Without a step in Python, and an object of PyTorch's, for each of the many pieces of a model.
    """
    return functools.partial(torch._C._cuda_getCurrentRawStream, torch.cuda.current_device())


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
