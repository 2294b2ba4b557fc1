"""Clock and energy of the device while something runs: at its power limit it slows down. Part of bench/gpu.py."""

from __future__ import annotations

import statistics
import threading
from typing import Any

SAMPLE_S = 0.02


class Power:
    """Samples device 0 inside a block; `figures` has what was seen, nothing where the device cannot be asked."""

    def __init__(self) -> None:
        self.figures: dict[str, float] = {}
        self._nvml: Any = None
        self._over = threading.Event()
        self._clocks: list[int] = []
        try:
            from vllm.third_party import pynvml

            pynvml.nvmlInit()
            self._nvml, self._device = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
        except Exception as error:
            print(f"# the device's clock and power cannot be read: {error}", flush=True)

    def __enter__(self) -> Power:
        if self._nvml is not None:
            self._clocks = []
            self._over.clear()
            self._begin = self._energy()
            self._thread = threading.Thread(target=self._sample)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._nvml is not None:
            energy = self._energy() - self._begin
            self._over.set()
            self._thread.join()
            self.figures = {"clock_mhz": statistics.mean(self._clocks), "energy_j": energy}

    def _energy(self) -> float:
        return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1e3

    def _sample(self) -> None:
        while True:
            self._clocks.append(self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM))
            if self._over.wait(SAMPLE_S):
                return
