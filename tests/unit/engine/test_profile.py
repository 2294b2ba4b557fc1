"""The times that a worker keeps of its own parts, and that nothing is left of them."""

from __future__ import annotations

import time

import pytest

from vllm_tap.engine.capture.profile import ForwardProfile, Profile


class Part:
    """Something whose methods are timed."""

    def work(self, number: int, *, times: int = 1) -> int:
        """Return a product, or fail for a number below zero."""
        if number < 0:
            raise ValueError("below zero")
        return number * times


def test_calls_are_timed_and_answered():
    """On an object and on its class alike, failures included; results and exceptions pass through."""
    part, profile = Part(), Profile()
    profile.watch(part, "work", "mine")
    profile.watch(Part, "work", "all")
    assert part.work(3, times=2) == 6
    assert Part().work(4) == 4
    with pytest.raises(ValueError, match="below zero"):
        part.work(-1)
    assert {label: len(times) for label, times in profile.stop().items()} == {"mine": 2, "all": 1}
    assert min(profile.figures["mine"]) >= 0


def test_beginnings_are_kept():
    """One time for each call, of the clock that the caller reads too, beside how long it took."""
    part, profile = Part(), Profile()
    profile.watch(part, "work", "mine")
    profile.stamp(part, "work", "mine at")
    before = time.perf_counter()
    assert [part.work(number) for number in (1, 2)] == [1, 2]
    assert len(profile.figures["mine"]) == 2
    first, second = profile.figures["mine at"]
    assert before <= first <= second <= time.perf_counter()
    profile.stop()
    assert vars(part) == {}


def test_everything_is_put_back():
    """After the end an object has no attribute more than before, and a class the function that it had."""
    part, profile, function = Part(), Profile(), Part.work
    profile.watch(part, "work")
    profile.watch(Part, "work")
    profile.stop()
    assert vars(part) == {}
    assert Part.work is function
    part.work(1)
    assert profile.figures == {}


def test_forward_passes_without_a_device_are_stamped_by_the_host():
    """When the runner got the step, was about to launch it, and had."""

    class Listener:
        """What a runner reports to."""

        def expect(self, marks: object) -> None:
            """Do nothing."""

        def before_forward(self, batch: object) -> None:
            """Do nothing."""

        def after_forward(self) -> None:
            """Do nothing."""

    listener = Listener()
    profile = ForwardProfile(listener, has_device=False)
    for _ in range(2):
        listener.expect([])
        listener.before_forward(None)
        listener.after_forward()
    figures = profile.stop()
    assert {label: len(times) for label, times in figures.items()} == {"expect at": 2, "arm at": 2, "drain at": 2}
    assert figures["expect at"][1] <= figures["arm at"][1] <= figures["drain at"][1]
    assert vars(listener) == {}
