"""A captured CUDA graph and its taps: what is executable of it, with which of them. Worker process.

A tap at 8 rows costs a graph half a microsecond to one and a half, one whose kernel node is disabled still a fifth of
one (bench/tap_kernel.py, one H200), times the number of layers, each step. To make a graph executable takes 0.15 ms and
0.1 MiB of device memory for a piece of one layer, 17 ms and 2 MiB for a whole model (the same). What executable graphs
took of the device's memory the driver keeps for the next ones.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import torch

from vllm_tap.engine.cuda import driver
from vllm_tap.engine.cuda.kernel import MAX_GROUPS
from vllm_tap.errors import DeviceError

logger = logging.getLogger("vllm_tap")


class Node(NamedTuple):
    """A kernel node of a graph, and the taps that it serves."""

    taps: frozenset[int]
    handle: int

    def in_copy(self, graph: int) -> Node:
        """Return the same node of a copy of its graph."""
        return self._replace(handle=driver.node_in_clone(self.handle, graph))


@dataclass(frozen=True)
class Wanted:
    """The taps that captures want, and of how many groups their kernels look at the tables."""

    taps: frozenset[int]
    num_groups: int

    def __bool__(self) -> bool:
        return bool(self.taps)


NOTHING: Final = Wanted(frozenset(), 0)

_Nodes = tuple[frozenset[int], int]
"""Nodes of a graph that serve taps, and for how many groups."""

_NO_NODES: Final[_Nodes] = frozenset(), 0

MOST_FORMS: Final = 4
"""Sets of taps and numbers of groups for which a graph is kept executable."""


class Switch(Protocol):
    """The object that says which taps are on."""

    on: Wanted

    @property
    def fail(self) -> Callable[[Exception], None]:
        """Called with what went wrong; the graph runs nevertheless, maybe without taps that are on."""


class TappedGraph:
    """A replayable graph in the place of PyTorch's. One step replays many: `replay` does as little as can be.

    Args:
        owner: PyTorch's graph, which lives at least as long.
        switch: Which taps are on.
    """

    def __init__(self, owner: Any, switch: Switch) -> None:
        self._owner, self._switch = weakref.ref(owner), switch
        self._launch, self._current_stream = driver.bare_launch(), _current_stream()

    def _leave_to_pytorch(self, error: DeviceError | None = None) -> None:
        """Have PyTorch queue its own executable graph: there is nothing else to queue, or the driver refused it."""
        if error is not None:
            self._switch.fail(error)
        owner: Any = self._owner()
        type(owner).replay(owner)


class GraphPiece(TappedGraph):
    """A graph of a piece of the model: executable without its taps at first, with them as soon as they are put in.

    `replay` does so if a capture wants one, `complete` ahead. What is on once stays until `disable`: a kernel that
    nobody wants ends at once, and to disable it costs more than it does, as long as captures come and go. What is
    executable stays: the driver keeps the memory that executable graphs have taken.

    Args:
        owner: PyTorch's graph, which lives at least as long.
        graph: The same, as the driver knows it. It stays as it is.
        taps: Its nodes that serve taps.
        switch: Which taps are on.
    """

    def __init__(self, owner: Any, graph: int, taps: list[Node], switch: Switch) -> None:
        super().__init__(owner, switch)
        self._graph, self._taps = graph, taps
        self._executable = _executable_with(frozenset(), 0, graph, taps)
        self._forms = {_NO_NODES: self._executable}
        self._num_groups = MAX_GROUPS  # as it was captured
        self._enabled: list[bool] | None = None  # the nodes, if they are there
        self._on = NOTHING  # all that are on among these are enabled
        weakref.finalize(self, _give_up, self._forms).atexit = False

    def replay(self) -> None:
        """Queue the graph with the taps that are on, and maybe with some that find out that they are not."""
        on = self._switch.on
        if on is not self._on and on:
            self._enable(on)
        code = self._launch(self._executable, self._current_stream())
        if code:
            self._leave_to_pytorch(driver.failure(code, "cuGraphLaunch"))

    @property
    def is_complete(self) -> bool:
        """True if its taps are there."""
        return self._enabled is not None

    def complete(self) -> None:
        """Have its taps there, disabled, before a capture wants one.

        Raises:
            DeviceError: The driver refused. The graph runs nevertheless.
        """
        self._put_in()
        self._look_at(1)
        self.disable()

    def disable(self) -> None:
        """Disable its taps: nobody is going to want them for a while.

        Raises:
            DeviceError: The driver refused, and some stay.
        """
        self._on = NOTHING
        self._set({place: False for place in range(len(self._taps))})

    def _enable(self, on: Wanted) -> None:
        self._on = NOTHING  # until all has gone well
        wanted = {place: True for place, node in enumerate(self._taps) if not node.taps.isdisjoint(on.taps)}
        try:
            if wanted and self._enabled is None:
                self._put_in()
                self._look_at(on.num_groups)
                wanted = {place: place in wanted for place in range(len(self._taps))}
            elif wanted and on.num_groups > self._num_groups:
                self._look_at(on.num_groups)
            self._set(wanted)
            self._on = on
        except DeviceError as error:
            self._switch.fail(error)

    def _put_in(self) -> None:
        every = frozenset(node.handle for node in self._taps)
        self._executable = self._forms[every, MAX_GROUPS] = driver.instantiate(self._graph)
        self._enabled, self._num_groups = [True] * len(self._taps), MAX_GROUPS
        driver.destroy_executable(self._forms.pop(_NO_NODES))

    def _look_at(self, num_groups: int) -> None:
        """Have its kernels look at so many groups: programs that find nothing to do take time as well."""
        if num_groups != self._num_groups:
            for node in self._taps:
                _set_depth(driver.set_depth_of_executable, self._executable, node.handle, num_groups)
            self._num_groups = num_groups

    def _set(self, wanted: dict[int, bool]) -> None:
        """Enable or disable nodes, by their places; where taps are not there, they need not be disabled."""
        if self._enabled is None:
            return
        for place, is_wanted in wanted.items():
            if self._enabled[place] != is_wanted:
                driver.set_node_enabled(self._executable, self._taps[place].handle, is_wanted)
                self._enabled[place] = is_wanted


class GraphCopy(TappedGraph):
    """A graph with its taps, beside one from which they were taken out.

    Args:
        owner: PyTorch's graph, which lives at least as long.
        graph: The same, as the driver knows it, to be copied.
        taps: Its nodes that serve taps.
        num_rows: How many rows pass them.
        switch: Which taps are on.
    """

    def __init__(self, owner: Any, graph: int, taps: list[Node], num_rows: int, switch: Switch) -> None:
        super().__init__(owner, switch)
        self.num_rows = num_rows
        self._graph = driver.clone_graph(graph)
        self._taps = [node.in_copy(self._graph) for node in taps]
        self._forms: dict[_Nodes, int] = {}
        self._on = NOTHING
        self._executable = 0
        weakref.finalize(self, _give_up, self._forms, self._graph).atexit = False

    def forget(self) -> None:
        """Give up what was made executable."""
        self._on, self._executable = NOTHING, 0
        while self._forms:
            driver.destroy_executable(self._forms.popitem()[1])

    def replay(self) -> None:
        """Queue the graph with the taps that are on and no others; PyTorch's own, if it has none of them."""
        on, failed = self._switch.on, None
        if on:
            try:
                if on is not self._on:
                    self._take_form(on)
                if self._executable:
                    driver.check(self._launch(self._executable, self._current_stream()), "cuGraphLaunch")
                    return
            except DeviceError as error:
                failed = error
        self._leave_to_pytorch(failed)

    def prepare(self, on: Wanted) -> bool:
        """Make ready what `replay` will queue; return whether there was anything to do."""
        return on is not self._on and self._take_form(on)

    def _take_form(self, on: Wanted) -> bool:
        """Choose what to launch; return whether it had to be made."""
        nodes = _handles(self._taps, on)
        wanted = nodes, on.num_groups
        is_new = bool(nodes) and wanted not in self._forms
        self._executable = self._form(wanted) if nodes else 0
        self._on = on
        return is_new

    def _form(self, wanted: _Nodes) -> int:
        """Return an executable graph with these taps; when there are many, the one that was made first goes."""
        if wanted not in self._forms:
            executable = self._executable_with(wanted)
            if len(self._forms) == MOST_FORMS:
                driver.destroy_executable(self._forms.pop(next(iter(self._forms))))
            self._forms[wanted] = executable
        return self._forms[wanted]

    def _executable_with(self, wanted: _Nodes) -> int:
        try:
            return _executable_with(*wanted, self._graph, self._taps, out_of_the_way=True)
        except DeviceError as error:
            logger.info("vllm-tap: kernels after taps start when these have ended altogether: %s", error)
            return _executable_with(*wanted, self._graph, self._taps)


def can_name_streams() -> bool:
    """Tell whether this PyTorch has what `_current_stream` needs, which its own compiled code calls."""
    return hasattr(torch._C, "_cuda_getCurrentRawStream")


def _current_stream() -> Callable[[], int]:
    """Return what says on which stream of this device a thread queues its work.

    Without a step in Python, and an object of PyTorch's, for each of the many pieces of a model.
    """
    return functools.partial(torch._C._cuda_getCurrentRawStream, torch.cuda.current_device())


def _handles(taps: Iterable[Node], on: Wanted) -> frozenset[int]:
    """Return the nodes that serve taps which are on."""
    return frozenset(node.handle for node in taps if node.taps & on.taps)


def _executable_with(
    wanted: frozenset[int], num_groups: int, graph: int, taps: Iterable[Node], *, out_of_the_way: bool = False
) -> int:
    """Return a graph made executable with these of its nodes for taps, for so many groups, and no others."""
    clone = driver.clone_graph(graph)
    try:
        nodes = [(node.handle in wanted, node.in_copy(clone).handle) for node in taps]
        for is_wanted, handle in nodes:
            if not is_wanted:
                driver.remove_node(clone, handle)
        for is_wanted, handle in nodes:
            if is_wanted and num_groups != MAX_GROUPS:
                _set_depth(driver.set_depth, handle, num_groups)
            if is_wanted and out_of_the_way:
                driver.let_next_start_early(clone, handle)
        return driver.instantiate(clone)
    finally:
        driver.destroy_graph(clone)


def _set_depth(function: Callable[..., None], *args: int) -> None:
    """Put up with a driver that refuses: kernels then look at all groups, which is right and slower."""
    try:
        function(*args)
    except DeviceError as error:
        logger.info("vllm-tap: taps in a CUDA graph look at %d groups: %s", MAX_GROUPS, error)


def _give_up(forms: dict[_Nodes, int], graph: int = 0) -> None:
    """Give up what nothing will launch any more: PyTorch's own graph is gone."""
    try:
        while forms:
            driver.destroy_executable(forms.popitem()[1])
        if graph:
            driver.destroy_graph(graph)
    except DeviceError as error:
        logger.info("vllm-tap: a CUDA graph with taps stays in memory: %s", error)
