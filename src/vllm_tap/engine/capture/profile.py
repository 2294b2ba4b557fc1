"""Times of the worker's own parts, while somebody asks for them. Worker process.

Nothing in the path of a step knows of this: methods are replaced on the objects while a profile is on, and put back.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Final

from vllm_tap.engine.cuda import driver

HOST: Final = "host"
DMA: Final = "dma"
FORWARD: Final = "forward"

Figures = dict[str, list[float]]


class Profile:
    """Collects figures by label, in the order in which they came, until `stop`."""

    def __init__(self) -> None:
        self.figures: Figures = {}
        self._undo: list[Callable[[], None]] = []

    def add(self, label: str, figure: float) -> None:
        """Keep a figure."""
        self.figures.setdefault(label, []).append(figure)

    def watch(self, owner: Any, name: str, label: str = "") -> None:
        """Time every call of a method, or of a module's function, in seconds."""

        def around(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(label or name, time.perf_counter() - begin)

        self.wrap(owner, name, around)

    def stamp(self, owner: Any, name: str, label: str) -> None:
        """Keep when each call of a method began, by `time.perf_counter`, a clock that processes of Linux share."""

        def around(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self.add(label, time.perf_counter())
            return function(*args, **kwargs)

        self.wrap(owner, name, around)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Send every call of `owner.name(...)` through `around(function, ...)`."""
        function, was_own = getattr(owner, name), name in vars(owner)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return around(function, *args, **kwargs)

        setattr(owner, name, wrapper)
        self._undo.append(lambda: setattr(owner, name, function) if was_own else delattr(owner, name))

    def stop(self) -> Figures:
        """Put everything back and return the figures."""
        while self._undo:
            self._undo.pop()()
        return self.figures


class DmaProfile(Profile):
    """Times every copy to the host by CUDA events on its own stream, and what follows the last forward pass.

    Figures: `copy_seconds` and `copy_bytes` of each copy. Per capture, at the moment when its rows are settled,
    `after_forward` (from the end of the last forward pass, or from when the rows are asked for if that is later, to the
    end of the last copy) and `copying_after_forward` (how much of that a copy was running), both of the device's clock.
    """

    def __init__(self) -> None:
        super().__init__()
        import torch

        from vllm_tap.engine.cuda.sink import DeviceSink

        self._current_stream = torch.cuda.current_stream
        self._idle = torch.cuda.Stream()  # whose events pass at once
        # Not PyTorch's, which lets go of the interpreter's lock to record one: while another thread had it, before the
        # copy is queued, the stream would have nothing to do, and the copy would seem to take as long.
        self._events = driver.Events(timed=True)
        self._taken: list[driver.Event] = []
        self._copies: list[tuple[driver.Event, driver.Event, int]] = []
        self._forward_end: driver.Event | None = None
        self._base = self._behind_forward()
        self.wrap(driver, "copy_to_host", self._copy)
        self.wrap(DeviceSink, "end", self._end)
        self.wrap(DeviceSink, "settle", self._settle)

    def _behind(self, stream: int) -> driver.Event:
        event = self._events.recorded(stream)
        self._taken.append(event)
        return event

    def _behind_forward(self) -> driver.Event:
        return self._behind(self._current_stream().cuda_stream)

    def _copy(self, function: Any, target: int, source: int, nbytes: int, stream: int) -> None:
        before = self._behind(stream)
        function(target, source, nbytes, stream)
        self._copies.append((before, self._behind(stream), nbytes))

    def _end(self, function: Any, sink: Any) -> Any:
        silent = function(sink)
        self._forward_end = self._behind_forward()
        return silent

    def _settle(self, function: Any, sink: Any) -> None:
        asked = self._behind(self._idle.cuda_stream)
        function(sink)
        if self._forward_end is not None and self._copies:
            for event in (asked, self._forward_end, self._copies[-1][1]):
                event.synchronize()
            self._add(max(self._since_base(self._forward_end), self._since_base(asked)))
        self._copies, self._forward_end = [], None
        while self._taken:
            self._events.give(self._taken.pop())
        self._base = self._behind_forward()

    def _add(self, end: float) -> None:
        spans = [(self._since_base(before), self._since_base(after)) for before, after, _ in self._copies]
        for (begin, done), (_, _, nbytes) in zip(spans, self._copies, strict=True):
            self.add("copy_seconds", done - begin)
            self.add("copy_bytes", nbytes)
        self.add("after_forward", max(spans[-1][1] - end, 0.0))
        self.add("copying_after_forward", sum(max(done - max(begin, end), 0.0) for begin, done in spans))

    def _since_base(self, event: driver.Event) -> float:
        # Counted from an event before all others: the time between two events may not be asked for backwards.
        return event.seconds_since(self._base)


class ForwardProfile(Profile):
    """Says when forward passes were launched and, on a CUDA device, when they ran there, by `time.perf_counter`.

    Figures, one of each per step: `expect at`, when the runner got the step; `arm at` and `drain at`, when the host was
    about to launch the forward pass and when it had; `begins at` and `ends at`, when the device did.
    """

    def __init__(self, recorder: Any, has_device: bool) -> None:
        super().__init__()
        self._events: list[tuple[str, Any]] = []
        if has_device:
            import torch

            self._new_event = functools.partial(torch.cuda.Event, enable_timing=True)
            self._base = self._new_event()
            self._base.record()
            self._base.synchronize()
            self._base_at = time.perf_counter()
            self.wrap(recorder, "arm", functools.partial(self._mark, "begins at"))
            self.wrap(recorder, "drain", functools.partial(self._mark, "ends at"))
        for name in ("expect", "arm", "drain"):
            self.stamp(recorder, name, f"{name} at")

    def _mark(self, label: str, function: Any, *args: Any) -> Any:
        result = function(*args)
        event = self._new_event()
        event.record()
        self._events.append((label, event))
        return result

    def stop(self) -> Figures:
        """Put everything back, wait for the device and return the figures."""
        figures = super().stop()
        for label, event in self._events:
            event.synchronize()
            self.add(label, self._base_at + self._base.elapsed_time(event) / 1e3)
        return figures
