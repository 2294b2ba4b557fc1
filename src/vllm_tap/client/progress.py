"""The progress bar of a capture: rows so far and in all, their rate, the time left. Client process."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

REFRESH_SECONDS: Final = 0.5
"""Seconds between two questions to the workers; a call takes about a millisecond of the engine's time."""

NUM_REFRESHES: Final = 20
"""The rate, and the time left, are those of so many refreshes: prompts take rows faster than what they generate."""

FORMAT: Final = "{percentage:3.0f}%|{bar}| {text}"
"""Wide enough for a bar in 60 columns."""


def is_shown(progress: bool | None) -> bool:
    """Say whether there is to be a bar: None stands for "when standard error is a terminal"."""
    return sys.stderr.isatty() if progress is None else progress


class Progress(NamedTuple):
    """Rows and bytes that workers have taken, and seconds for which the engine has waited for room for them."""

    rows: int
    nbytes: int
    stalled: float


class Bar:
    """A bar that moves with rows. vLLM makes it with `make`, and would move it with finished prompts.

    Args:
        counts: What the workers have taken so far, also when they have just ended the capture.
        expected: Rows that there will be.
        clock: Seconds.
    """

    def __init__(
        self,
        counts: Callable[[], Progress],
        expected: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counts, self._expected, self._clock = counts, expected, clock
        self._seen: deque[tuple[float, int, int]] = deque(maxlen=NUM_REFRESHES)
        self._shown: Any = None

    def make(self, requests: Any = None, **kwargs: Any) -> Any:
        """Return what vLLM's `use_tqdm` wants: a progress bar, but none for requests that are about to be queued."""
        if requests is not None:
            return requests
        self._begun = self._clock()
        self._seen.append((self._begun, 0, 0))
        self._shown = _new_bar(self._end, f"0/{_short(self._expected())} rows")
        return self._shown

    def tick(self) -> None:
        """Show what has come."""
        if self._shown is None:
            return
        now, (rows, nbytes, stalled) = self._clock(), self._counts()
        total = max(self._expected(), rows)
        begun, rows_before, bytes_before = self._seen[0]
        self._seen.append((now, rows, nbytes))
        seconds = max(now - begun, 1e-9)
        rate = (rows - rows_before) / seconds
        left = _interval((total - rows) / rate) if rate else "?"
        rate_text = _rate(nbytes - bytes_before, seconds)
        self._show(rows, total, f"{_short(rows)}/{_short(total)} rows, {rate_text}, {left} left{_waited(stalled)}")

    def close(self) -> None:
        """Leave the bar as it stands, which vLLM does not do with one that it has made when it is interrupted."""
        if self._shown is not None:
            self._shown.end = None
            self._shown.close()
            self._shown = None

    def _end(self) -> None:
        """Show all that came."""
        seconds, (rows, nbytes, stalled) = max(self._clock() - self._begun, 1e-9), self._counts()
        text = f"{_short(rows)} rows, {_rate(nbytes, seconds)}, {_interval(seconds)}{_waited(stalled)}"
        self._show(rows, rows, text)

    def _show(self, rows: int, total: int, text: str) -> None:
        self._shown.n, self._shown.total, self._shown.text = rows, total, text
        self._shown.refresh()


def _new_bar(end: Callable[[], None], text: str) -> Any:
    from tqdm import tqdm

    class RowsBar(tqdm):  # type: ignore[misc]
        """A bar of tqdm's that moves only when it is told to."""

        monitor_interval = 0  # tqdm's thread would keep this class, and what it asks, for ever
        text = ""
        end: Callable[[], None] | None = None

        @property
        def format_dict(self) -> dict[str, Any]:
            return {**super().format_dict, "text": self.text}

        def update(self, n: float | None = 1) -> bool | None:
            return None  # a prompt is finished

        def close(self) -> None:
            end, self.end = self.end, None
            if end is not None and sys.exception() is None:
                end()
            super().close()

    new = RowsBar(total=1, bar_format=FORMAT, dynamic_ncols=True, delay=1e-9)
    new.text, new.end = text, end
    new.refresh()
    return new


def _short(number: float) -> str:
    from tqdm import tqdm

    return str(tqdm.format_sizeof(number)) if number >= 1000 else f"{number:.0f}"


def _rate(nbytes: int, seconds: float) -> str:
    from tqdm import tqdm

    return str(tqdm.format_sizeof(nbytes / seconds, "B/s"))


def _waited(stalled: float) -> str:
    """Return for how long the engine has waited for files, if it did."""
    return f", stalled {stalled:.1f} s" if stalled else ""


def _interval(seconds: float) -> str:
    from tqdm import tqdm

    return str(tqdm.format_interval(seconds))
