"""The choice of a codec by what was measured, on a clock of the test's own."""

from __future__ import annotations

import pytest

from vllm_tap.codec import meter
from vllm_tap.codec.meter import PROBE_BYTES, STALE_SECONDS, TRIAL_SECONDS, Meter

MIB = 1 << 20
LINK = 125e6


class Clock:
    """The time, which passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """Return it."""
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The meter's clock."""
    clock = Clock()
    monkeypatch.setattr(meter, "time", clock)
    return clock


def probed(clock: Clock) -> Meter:
    """Return a meter that has found the rate of a link of 1 Gbit/s."""
    found = Meter(4, ("raw", "bytesplit"))
    found.begin()
    clock.now += PROBE_BYTES / LINK
    found.note("raw", PROBE_BYTES, PROBE_BYTES, 0.0, 0.0)
    assert found.link_bytes_per_second == pytest.approx(LINK)
    return found


def come(found: Meter, clock: Clock, rate: float, seconds: float) -> None:
    """Have rows arrive by byte split at a rate, for a time."""
    for _ in range(round(rate * seconds / MIB)):
        clock.now += MIB / rate
        found.note("bytesplit", MIB, int(MIB / 1.46), MIB / 0.4e9, MIB / 0.8e9)


@pytest.mark.parametrize(("share", "kept"), [(1.4, "bytesplit"), (0.4, "raw")])
def test_a_codec_that_brings_rows_later_than_none_is_left_out_for_a_while(clock, share, kept):
    """Cores that are busy otherwise do not show in the time that one piece takes, but in what arrives."""
    found = probed(clock)
    assert found.choose() == "bytesplit"
    come(found, clock, share * LINK, 3 * TRIAL_SECONDS)
    assert found.choose() == kept
    clock.now += STALE_SECONDS + 1
    assert found.choose() == "raw"  # to measure the link anew
    found.begin()
    clock.now += PROBE_BYTES / LINK
    found.note("raw", PROBE_BYTES, PROBE_BYTES, 0.0, 0.0)
    assert found.choose() == "bytesplit"
