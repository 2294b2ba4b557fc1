"""The progress bar of a capture: prompts done, rows taken, GB/s. Client process."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

REFRESH_SECONDS = 0.5
"""Seconds between two questions to the workers; a call takes about a millisecond of the engine's time."""


def bar(progress: bool | None, counts: Callable[[], tuple[int, int]]) -> Any:
    """Return what vLLM's `use_tqdm` wants: False, or a factory of progress bars that also show rows and GB/s.

    Args:
        progress: True or False, or None for "when standard error is a terminal".
        counts: Rows and bytes that the workers have taken so far, also when they have just ended the capture.
    """
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return False
    from tqdm import tqdm

    class RowsBar(tqdm):  # type: ignore[misc]
        """vLLM's bar with our rows instead of token rates."""

        monitor_interval = 0  # tqdm's thread would keep this class, and what it asks, for ever
        asked = 0.0
        text = ""

        def __setattr__(self, name: str, value: Any) -> None:
            # vLLM assigns its token rates to `postfix`; the bar shows rows there.
            super().__setattr__(name, self.text if name == "postfix" else value)

        def update(self, n: float | None = 1) -> bool | None:
            now = time.monotonic()
            if now - self.asked > REFRESH_SECONDS or self.n + (n or 0) == self.total:
                self.asked = now
                rows, nbytes = counts()
                elapsed = max(now - self.started, 1e-9)
                self.text = f"{rows:,} rows, {nbytes / elapsed / 1e9:.2f} GB/s"
                self.postfix = self.text
            refreshed: bool | None = super().update(n)
            return refreshed

    def make(requests: Any = None, **kwargs: Any) -> Any:
        if requests is not None:  # about to be queued, which vLLM would count with a bar of its own
            return requests
        kwargs.update(desc="Capturing", unit="prompt", postfix=None)
        new = RowsBar(**kwargs)
        object.__setattr__(new, "started", time.monotonic())
        return new

    return make
