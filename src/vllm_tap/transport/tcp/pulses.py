"""Signs of life of a worker, for clients whose calls take long. Worker process."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from vllm_tap.transport import threads
from vllm_tap.transport.tcp.stream import Stream

PULSE_SECONDS: Final = 1.0


class Pulses:
    """Sends the same frame to clients every second, as long as calls of theirs are handled.

    Args:
        frame: A few bytes.
    """

    def __init__(self, frame: bytes) -> None:
        self._frame = frame
        self._lock = threading.Lock()
        self._streams: set[Stream] = set()
        self._closing = threading.Event()
        threads.start("vllm-tap-pulses", self._run, stop=self._closing.set)

    @contextlib.contextmanager
    def of(self, stream: Stream) -> Iterator[None]:
        """Send to a client inside the block, in which nobody else uses its connection."""
        with self._lock:
            self._streams.add(stream)
        try:
            yield
        finally:
            with self._lock:  # not while a pulse is being sent
                self._streams.discard(stream)

    def close(self) -> None:
        """Send nothing more."""
        self._closing.set()

    def _run(self) -> None:
        while not self._closing.wait(PULSE_SECONDS):
            with self._lock:
                for stream in self._streams:
                    with contextlib.suppress(OSError, ValueError):  # who replies finds out
                        if stream.is_writable():
                            stream.sendall(self._frame)
