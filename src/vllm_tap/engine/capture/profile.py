"""Times of the worker's own parts, while somebody asks for them. Worker process.

Nothing in the path of a step knows of this: methods are replaced on the objects while a profile is on, and put back.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, Final

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


LABELS: Final = {"before_forward": "arm", "after_forward": "drain", "after_sampling": "sampled", "on_idle": "rest"}
"""Methods of a worker during a step, and the labels of their figures: those of the results that are published."""


class ForwardProfile(Profile):
    """Says when forward passes were launched and, on a CUDA device, when they ran there, by `time.perf_counter`.

    Figures, one of each per step: `expect at`, when the runner got the step; `arm at` and `drain at`, when the host was
    about to launch the forward pass and when it had; `begins at` and `ends at`, when the device did.
    """

    def __init__(self, listener: Any, has_device: bool) -> None:
        super().__init__()
        self._events: list[tuple[str, Any]] = []
        if has_device:
            import torch

            self._new_event = functools.partial(torch.cuda.Event, enable_timing=True)
            self._base = self._new_event()
            self._base.record()
            self._base.synchronize()
            self._base_at = time.perf_counter()
            self.wrap(listener, "before_forward", functools.partial(self._mark, "begins at"))
            self.wrap(listener, "after_forward", functools.partial(self._mark, "ends at"))
        for name in ("expect", "before_forward", "after_forward"):
            self.stamp(listener, name, f"{LABELS.get(name, name)} at")

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
