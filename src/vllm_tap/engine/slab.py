"""Device memory for staging: taken when a capture starts, given back a moment after the last one ends. Worker process.

Captures often come one after another; taking and giving back some hundred MiB costs about 2 milliseconds each time.
"""

from __future__ import annotations

import threading
from typing import Final

import torch

from vllm_tap.engine import cuda

LINGER_SECONDS: Final = 1.0


class Slab:
    """One piece of device memory, handed out in aligned parts."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self._used = 0

    def part(self, nbytes: int) -> int:
        """Return the address of the next part."""
        address = self.address + self._used
        self._used += aligned(nbytes)
        assert self._used <= self.nbytes
        return address

    def clear(self) -> None:
        """Forget all parts."""
        self._used = 0


class SlabKeeper:
    """Keeps the slab between captures for a moment."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._idle: Slab | None = None
        self._timer: threading.Timer | None = None

    def take(self, nbytes: int) -> Slab | None:
        """Return a slab of at least `nbytes`, or None if the device has no room."""
        with self._lock:
            self._cancel()
            slab, self._idle = self._idle, None
            if slab is not None and slab.nbytes >= nbytes:
                slab.clear()
                return slab
            if slab is not None:
                cuda.free(slab.address)
        address = cuda.allocate(nbytes)
        return Slab(address, nbytes) if address else None

    def give(self, slab: Slab) -> None:
        """Take a slab back, and return it to the device unless it is wanted again soon."""
        with self._lock:
            self._cancel()
            if self._idle is not None:
                cuda.free(self._idle.address)
            self._idle = slab
            self._timer = threading.Timer(LINGER_SECONDS, self._free)
            self._timer.daemon = True
            self._timer.start()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _free(self) -> None:
        with self._lock:
            slab, self._idle = self._idle, None
            if slab is not None:
                torch.cuda.set_device(self._device)
                cuda.free(slab.address)


def aligned(nbytes: int) -> int:
    """Round up to what parts of a slab are aligned to."""
    return -(-nbytes // 256) * 256
