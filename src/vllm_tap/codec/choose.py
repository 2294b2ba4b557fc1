"""Which codec for a link, from rates that were measured.

Runs in the client, before it asks for payloads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple

from vllm_tap import codec
from vllm_tap.errors import SpecError


class Rates(NamedTuple):
    """Rates of one core with bfloat16 hidden states."""

    ratio: float
    encode_gb_per_s: float
    decode_gb_per_s: float

    def seconds_per_gb(self, link_gb_per_s: float) -> float:
        """Return the time for 1 GB: encoded, sent and decoded one after the other, as a payload is."""
        return 1 / self.encode_gb_per_s + 1 / (self.ratio * link_gb_per_s) + 1 / self.decode_gb_per_s

    def streamed_seconds_per_gb(self, link_gb_per_s: float, num_lanes: int) -> float:
        """Return the time for 1 GB of many pieces, which are encoded, sent and decoded at the same time, in lanes."""
        slowest_core = min(self.encode_gb_per_s, self.decode_gb_per_s) * num_lanes
        return max(1 / slowest_core, 1 / (self.ratio * link_gb_per_s))


RATES: Final = {
    "raw": Rates(1.0, 7.156, 6.317),
    "lz4": Rates(0.9961, 3.46, 3.794),
    "zstd": Rates(1.2745, 0.455, 0.584),
    "bytesplit": Rates(1.4642, 0.4, 0.832),
}
"""Medians from `bench/results/codecs-cpu.json`: all 30 layers of SmolLM2-135M-Instruct over 822 tokens of text, on one
core of an AMD EPYC (Zen 3), by `make bench-codecs`. Other models and streams differ: measure yours."""

LEAST_GAIN: Final = 1.1
"""A codec costs both ends time of their cores: it is taken where a link brings so many times as much by it."""


def best(link_bytes_per_second: float, rates: Mapping[str, Rates], num_lanes: int) -> str:
    """Return the name of the codec that brings many pieces over soonest; one that is not `raw` if it gains a tenth."""
    link = link_bytes_per_second / 1e9
    name = min(rates, key=lambda name: rates[name].streamed_seconds_per_gb(link, num_lanes))
    gain = 1 / (link * rates[name].streamed_seconds_per_gb(link, num_lanes))
    return name if gain >= LEAST_GAIN else "raw"


def auto(link_bytes_per_second: float, same_host: bool) -> str:
    """Return the name of the codec that brings a payload over soonest, among those whose packages are installed here.

    Within a host that is always `raw`. By the rates above, byte split pays below about 0.093 GB/s (0.75 Gbit/s).

    Raises:
        SpecError: the speed of the link is not positive.
    """
    if same_host:
        return "raw"
    if not link_bytes_per_second > 0:
        raise SpecError(f"link_bytes_per_second is {link_bytes_per_second}, expected more than 0: measure the link")
    usable = [name for name in RATES if codec.installed(name)]
    return min(usable, key=lambda name: RATES[name].seconds_per_gb(link_bytes_per_second / 1e9))
