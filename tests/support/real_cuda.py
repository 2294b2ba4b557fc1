"""The GPU of this machine in the place of the simulated one, for steps of `simulated_engine`; runs in the test process.

The device works when it likes: what the simulated one shows to be unordered may here be wrong bytes, or nothing at all.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import torch


class RecordedGraph:
    """A graph whose inputs are drawn anew before each replay."""

    def __init__(self, graph: Any, refills: list[Callable[[], None]]) -> None:
        self._graph, self._refills = graph, refills

    def replay(self) -> None:
        for refill in self._refills:
            refill()
        self._graph.replay()


class RealCuda:
    """What `simulated_engine` asks of a device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda")
        self.conflicts: list[str] = []
        self.num_host_waits = 0
        self._refills: list[Callable[[], None]] = []
        self._after = torch.zeros(8, device=self.device)

    def run(self, work: Callable[[], object], is_tap: bool = False, tensors: Iterable[torch.Tensor] = ()) -> None:
        """Do work, or record a kernel that writes the same tensors; what they get is drawn before each replay."""
        if not torch.cuda.is_current_stream_capturing():
            work()
            return
        tensors = list(tensors)
        if not tensors:
            self._after.add_(1)
            return
        # Of the graph's own memory, which they keep as long as the graph is there.
        sources = [torch.empty_like(tensor) for tensor in tensors]

        def refill() -> None:
            work()
            for source, tensor in zip(sources, tensors, strict=True):
                source.copy_(tensor)

        self._refills.append(refill)
        for source, tensor in zip(sources, tensors, strict=True):
            tensor.copy_(source)

    def captured(self, switch: Any, run: Callable[[], None]) -> RecordedGraph:
        """Record a graph, after a run outside that compiles its kernels."""
        run()
        torch.cuda.synchronize()
        gc.collect()  # graphs of a test before cannot be given up while another one is captured
        self._refills = refills = []  # type: ignore[var-annotated]
        with switch.keeping(), torch.cuda.stream(torch.cuda.Stream()):
            graph = torch.cuda.CUDAGraph()
            gc.disable()
            try:
                graph.capture_begin()
                run()
                graph.capture_end()
            finally:
                gc.enable()
        torch.cuda.synchronize()
        return RecordedGraph(graph, refills)

    def host_access(self, begin: int, nbytes: int, writes: bool, what: str) -> None:
        """Note that the host itself reads or writes bytes: nobody keeps a list here."""

    def synchronize(self) -> None:
        """Wait until the device has done everything."""
        torch.cuda.synchronize()
