"""Device memory for staging: taken when a capture starts, given back some seconds after the last one. Worker process.

Captures often come one after another; taking and giving back some hundred MiB costs about 2 milliseconds each time, and
giving back waits for all work that is queued on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch

from vllm_tap.engine.capture.idle import Keeper
from vllm_tap.engine.cuda import driver

LINGER_SECONDS: Final = 10.0
"""Seconds that a slab stays which nobody uses."""

PATIENCE_SECONDS: Final = 60.0
"""After this long it goes, whether the device is quiet or not."""

MOST_IDLE: Final = 4
"""Slabs that are kept for captures to come. To free one waits for all queued work: where captures that ran side by side
end one after the other, the engine is not to wait for each."""

ALIGNMENT: Final = 256
"""Parts of a slab start and end on multiples of this many bytes."""


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


class SlabKeeper(Keeper):
    """Keeps slabs between captures for a while; its thread also knows when there is a pause for other work.

    Args:
        device: On which the slabs lie.
        headroom: Bytes of device memory that the engine's steps may still take: a slab never reaches into them.
        is_quiet: Whether the device has nothing to do. The driver waits for all queued work before it frees memory,
            and the engine waits with it; so a slab goes in a pause of the engine.
        on_idle: Called some seconds after the last capture, before its slab goes, if it had one, from a thread of the
            keeper's: for what else goes.
        in_pause: Called from there after that, until it says that it has done everything: for what is made ready for
            the next capture, while the device is quiet.

    Attributes:
        is_preparing: Whether `in_pause` is still to be called.
    """

    what = "staging memory"

    def __init__(
        self,
        device: torch.device,
        headroom: Callable[[], int],
        is_quiet: Callable[[], bool],
        on_idle: Callable[[], None] = lambda: None,
        in_pause: Callable[[], bool] = lambda: True,
    ) -> None:
        super().__init__()
        self._device, self._headroom, self._is_quiet = device, headroom, is_quiet
        self._on_idle, self._in_pause = on_idle, in_pause
        self.is_preparing = False
        self._idle: list[Slab] = []
        self._floor = 0
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """Bytes of all slabs, in use or not."""
        return self._held_bytes

    def take(self, nbytes: int) -> Slab | None:
        """Return a slab of at least `nbytes`, or None if the device has no room to spare."""
        with self._lock:
            fitting = [slab for slab in self._idle if slab.nbytes >= nbytes]
            if fitting:
                slab = min(fitting, key=lambda slab: slab.nbytes)
                self._idle.remove(slab)
                slab.clear()
                return slab
            small, self._idle = self._idle, []
        for slab in small:
            self._free(slab)
        # Asking PyTorch takes some 0.1 ms: while the slab is kept, what it said now is compared with what is free.
        self._floor = self._headroom()
        if self._free_bytes() < nbytes + self._floor:
            return None
        address = driver.allocate(nbytes)
        if not address:
            return None
        with self._lock:
            self._held_bytes += nbytes
        return Slab(address, nbytes)

    def give(self, slab: Slab | None) -> None:
        """A capture ends: take its slab back, if it had one, and return it to the device unless one is wanted soon."""
        spare: list[Slab] = []
        if slab is not None:
            with self._lock:
                by_size = sorted([*self._idle, slab], key=lambda slab: slab.nbytes)
                spare, self._idle = by_size[:-MOST_IDLE], by_size[-MOST_IDLE:]
        self.linger()
        for each in spare:
            self._free(each)

    def _begin(self) -> None:
        torch.cuda.set_device(self._device)

    def _let_go(self, now: float) -> None:
        with self._lock:
            if self._idle_since is None:
                return
            slabs, self._idle, self._idle_since = self._idle, [], None
        try:
            self._on_idle()  # first: when `held_bytes` says so, nothing is held any more
            self.is_preparing = True
        finally:
            for slab in slabs:
                self._free(slab)
        self._prepare()

    def tidy(self, now: float) -> bool:
        """Let go what it is time for, and prepare; return whether there is anything left to look after."""
        if self.is_preparing:
            self._prepare()
        return super().tidy(now)

    def _prepare(self) -> None:
        is_done = True
        try:
            is_done = self._in_pause()
        finally:
            self.is_preparing = not is_done

    def _has_more(self) -> bool:
        return self._held_bytes > 0 or self._idle_since is not None or self.is_preparing

    def _is_due(self, idle_seconds: float) -> bool:
        if self._free_bytes() < self._floor:
            return True
        return idle_seconds >= PATIENCE_SECONDS or (idle_seconds >= LINGER_SECONDS and self._is_quiet())

    def _free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[0])

    def _free(self, slab: Slab) -> None:
        driver.free(slab.address)
        with self._lock:
            self._held_bytes -= slab.nbytes


def aligned(nbytes: int) -> int:
    """Round up to what parts of a slab are aligned to."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
