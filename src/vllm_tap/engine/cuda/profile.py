"""Times of copies to the host, by events on their own stream. Worker process."""

from __future__ import annotations

from typing import Any

import torch

from vllm_tap.engine.capture.profile import Profile
from vllm_tap.engine.cuda import driver
from vllm_tap.engine.cuda.sink import DeviceSink


class DmaProfile(Profile):
    """Times every copy to the host by CUDA events on its own stream, and what follows the last forward pass.

    Figures: `copy_seconds` and `copy_bytes` of each copy. Per capture, at the moment when its rows are settled,
    `after_forward` (from the end of the last forward pass, or from when the rows are asked for if that is later, to the
    end of the last copy) and `copying_after_forward` (how much of that a copy was running), both of the device's clock.
    """

    def __init__(self) -> None:
        super().__init__()
        self._current_stream = torch.cuda.current_stream
        self._idle = torch.cuda.Stream()  # whose events pass at once
        # Not PyTorch's, which lets go of the interpreter's lock to record one: while another thread had it, before the
        # copy is queued, the stream would have nothing to do, and the copy would seem to take as long.
        self._events = driver.Events(driver.TIMED)
        self._taken: list[driver.Event] = []
        self._copies: list[tuple[driver.Event, driver.Event, int]] = []
        self._forward_end: driver.Event | None = None
        self._base = self._behind_forward()
        self.wrap(driver, "copy_to_host", self._copy)
        self.wrap(DeviceSink, "after_forward", self._end)
        self.wrap(DeviceSink, "synchronize", self._settle)

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
