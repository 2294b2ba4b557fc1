"""A codec chosen by what was measured on the way: the rate of the link, and of the cores at both ends.

Runs in the client. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from typing import Final

from vllm_tap.codec.choose import RATES, Rates, best

PROBE_BYTES: Final = 4 << 20
"""Bytes without a codec that tell the rate of a link."""

PROBE_SECONDS: Final = 0.05
"""Or as many as come in this time."""

STALE_SECONDS: Final = 30.0
"""Seconds after which the link is measured anew."""

TRIAL_SECONDS: Final = 0.5
"""Seconds of rows by one codec that tell whether they come as fast as without."""


class Meter:
    """Measures transfers of rows and says which codec the next one takes.

    Args:
        num_lanes: Connections that encode, send and decode beside one another.
        usable: Names of codecs that both ends have.

    Attributes:
        link_bytes_per_second: Rate that was measured without a codec; 0 before.
    """

    def __init__(self, num_lanes: int, usable: tuple[str, ...]) -> None:
        self._num_lanes, self._usable = num_lanes, usable
        self._lock = threading.Lock()
        self._rates = {name: RATES[name] for name in usable}
        self._probed_at = float("-inf")
        self._begin, self._nbytes = 0.0, 0
        self._slow_at: dict[str, float] = {}
        self._name, self._trial_begin, self._trial_nbytes = "", 0.0, 0
        self.link_bytes_per_second = 0.0

    def begin(self) -> None:
        """Note that bytes are about to be asked for, after a pause."""
        with self._lock:
            self._begin, self._nbytes = time.monotonic(), 0
            self._name = ""

    @property
    def is_probing(self) -> bool:
        """True while the rate of the link is not known, or not any more."""
        return time.monotonic() - self._probed_at > STALE_SECONDS

    def choose(self) -> str:
        """Return the codec for the next bytes."""
        with self._lock:
            if self.is_probing:
                return "raw"
            now = time.monotonic()
            usable = {name: rates for name, rates in self._rates.items() if self._is_usable(name, now)}
            return best(self.link_bytes_per_second, usable, self._num_lanes)

    def _is_usable(self, name: str, now: float) -> bool:
        return now - self._slow_at.get(name, float("-inf")) > STALE_SECONDS

    def refuse(self, name: str) -> None:
        """Leave out a codec that the other end does not have."""
        with self._lock:
            self._rates.pop(name, None)

    def note(self, name: str, nbytes: int, encoded_bytes: int, encode_s: float, decode_s: float) -> None:
        """Take note of bytes that have arrived."""
        with self._lock:
            self._note_link(encoded_bytes, name == "raw")
            if name in self._rates and encode_s > 0 and decode_s > 0:
                found = Rates(nbytes / encoded_bytes, nbytes / encode_s / 1e9, nbytes / decode_s / 1e9)
                before = self._rates[name]
                self._rates[name] = Rates(*((old + new) / 2 for old, new in zip(before, found, strict=True)))
            self._note_trial(name, nbytes)

    def _note_trial(self, name: str, nbytes: int) -> None:
        """Leave a codec out for a while if rows would have come sooner without: cores may be busy otherwise."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._trial_begin, self._trial_nbytes = name, now, 0
            return
        self._trial_nbytes += nbytes
        seconds = now - self._trial_begin
        if name == "raw" or name not in self._rates or seconds < TRIAL_SECONDS:
            return
        if self._trial_nbytes / seconds < self.link_bytes_per_second:
            self._slow_at[name] = now
        self._trial_begin, self._trial_nbytes = now, 0

    def _note_link(self, nbytes: int, is_raw: bool) -> None:
        now = time.monotonic()
        self._nbytes += nbytes
        seconds = max(now - self._begin, 1e-6)
        rate = self._nbytes / seconds
        if is_raw and (self._nbytes >= PROBE_BYTES or seconds >= PROBE_SECONDS):
            self.link_bytes_per_second, self._probed_at = rate, now
        elif not is_raw:  # then the cores may be what limits it
            self.link_bytes_per_second = max(self.link_bytes_per_second, rate)
