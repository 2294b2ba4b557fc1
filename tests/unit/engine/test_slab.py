"""When staging memory is taken, kept and given back; the driver's calls are played by this file."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch

from vllm_tap.engine.cuda import driver
from vllm_tap.engine.cuda.slab import LINGER_SECONDS, PATIENCE_SECONDS, SlabKeeper


class Device:
    """A device of 1000 bytes, and what the engine says of itself."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.headroom = 100
        self.is_quiet = True

    def allocate(self, nbytes: int) -> int:
        """Return a new address, or 0 where there is no room."""
        if nbytes > self.free_bytes():
            return 0
        address = 1000 + max(self.held, default=0)
        self.held[address] = nbytes
        return address

    def free_bytes(self) -> int:
        """Return what is left."""
        return 1000 - sum(self.held.values())


class Keeper(SlabKeeper):
    """A keeper whose thread is called by hand."""

    threads = 0

    def _start(self) -> None:
        self.threads += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device in place of the driver's."""
    device = Device()
    monkeypatch.setattr(driver, "allocate", device.allocate)
    monkeypatch.setattr(driver, "free", device.held.pop)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (device.free_bytes(), 1000))
    return device


@pytest.fixture
def keeper(device: Device, monkeypatch: pytest.MonkeyPatch) -> Keeper:
    """A keeper whose slabs are given back at time 0."""
    monkeypatch.setattr("vllm_tap.engine.capture.idle.time.monotonic", lambda: 0.0)
    return Keeper(torch.device("cpu"), lambda: device.headroom, lambda: device.is_quiet)


def take(keeper: SlabKeeper, nbytes: int) -> Any:
    """Take a slab that must be there."""
    slab = keeper.take(nbytes)
    assert slab is not None
    return slab


def test_captures_that_follow_one_another_share_a_slab(keeper: Keeper, device: Device) -> None:
    """A slab that is large enough is handed out again, from its start; one thread looks after all of them."""
    first = take(keeper, 512)
    first.part(500)
    keeper.give(first)
    again = take(keeper, 400)
    assert (again.address, again.part(256)) == (first.address, first.address)
    keeper.give(again)
    assert keeper.threads == 1
    assert device.held == {first.address: 512}


def test_captures_side_by_side_leave_their_slabs_to_the_next_ones(keeper: Keeper, device: Device) -> None:
    """So many; each gets the smallest that is large enough. All go when the last capture has ended."""
    slabs = []
    for nbytes in (100, 300, 50, 200, 150):
        keeper.keep()
        slabs.append(take(keeper, nbytes))
    for slab in slabs[:-1]:
        keeper.give(slab)
    assert keeper.tidy(PATIENCE_SECONDS), "one is under way"
    assert sorted(device.held.values()) == [50, 100, 150, 200, 300]
    keeper.give(slabs[-1])
    assert sorted(device.held.values()) == [100, 150, 200, 300]
    keeper.keep()
    again = take(keeper, 120)
    assert again.nbytes == 150
    keeper.give(again)
    assert not keeper.tidy(LINGER_SECONDS)
    assert device.held == {}


def test_a_slab_that_is_too_small_makes_room_for_a_larger_one(keeper: Keeper, device: Device) -> None:
    """Both together would not fit."""
    keeper.give(take(keeper, 500))
    take(keeper, 800)
    assert list(device.held.values()) == [800]
    assert keeper.held_bytes == 800


def test_idle_memory_is_zero_after_a_while(keeper: Keeper, device: Device) -> None:
    """Not before the time is up, not while a capture uses it; then the thread ends, and another begins if need be."""
    slab = take(keeper, 500)
    keeper.give(slab)
    assert keeper.tidy(LINGER_SECONDS - 0.1)
    take(keeper, 500)
    assert keeper.tidy(LINGER_SECONDS + 0.1)
    assert keeper.held_bytes == 500
    keeper.give(slab)
    assert not keeper.tidy(LINGER_SECONDS + 0.1)
    assert device.held == {}
    assert keeper.held_bytes == 0
    keeper.give(take(keeper, 500))
    assert keeper.threads == 2


@pytest.mark.parametrize("fails", [False, True])
def test_what_goes_with_a_slab_goes_first(device: Device, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Who sees that no staging memory is held can count on it; the memory goes whatever becomes of the rest."""
    held = []

    def on_idle() -> None:
        held.append(keeper.held_bytes)  # type: ignore[attr-defined]
        if fails:
            raise RuntimeError

    monkeypatch.setattr("vllm_tap.engine.capture.idle.time.monotonic", lambda: 0.0)
    keeper = Keeper(torch.device("cpu"), lambda: 0, lambda: True, on_idle)
    keeper.give(take(keeper, 500))
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        keeper.tidy(LINGER_SECONDS + 0.1)
    assert held == [500]
    assert device.held == {}


def test_what_is_prepared_in_pauses_is_tried_until_it_is_done(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the memory, which does not wait for it; once after each capture, also if it fails."""
    answers: list[bool | Exception] = [False, False, True, RuntimeError(), True]
    held = []

    def in_pause() -> bool:
        held.append(keeper.held_bytes)  # type: ignore[attr-defined]
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr("vllm_tap.engine.capture.idle.time.monotonic", lambda: 0.0)
    keeper = Keeper(torch.device("cpu"), lambda: 0, lambda: True, in_pause=in_pause)
    keeper.give(take(keeper, 500))
    assert keeper.tidy(LINGER_SECONDS - 0.1)
    assert held == []
    assert keeper.tidy(LINGER_SECONDS + 0.1)
    assert keeper.is_preparing
    assert keeper.tidy(LINGER_SECONDS + 1.1)
    assert not keeper.tidy(LINGER_SECONDS + 2.1)
    assert not keeper.is_preparing
    keeper.give(take(keeper, 500))
    with pytest.raises(RuntimeError):
        keeper.tidy(LINGER_SECONDS + 0.1)
    assert not keeper.is_preparing
    keeper.give(take(keeper, 500))
    keeper.tidy(LINGER_SECONDS + 0.1)
    assert (held, answers) == ([0] * 5, [])


def test_memory_goes_back_in_a_pause_of_the_engine(keeper: Keeper, device: Device) -> None:
    """Freeing waits for what is queued; an engine that never pauses is not spared for ever."""
    keeper.give(take(keeper, 500))
    device.is_quiet = False
    assert keeper.tidy(LINGER_SECONDS + 0.1)
    assert not keeper.tidy(PATIENCE_SECONDS)
    assert device.held == {}


def test_a_slab_leaves_what_the_steps_of_the_engine_may_need(keeper: Keeper, device: Device) -> None:
    """900 of 1000 bytes fit beside 100 of headroom, 901 do not."""
    assert keeper.take(901) is None
    assert device.held == {}
    take(keeper, 900)


def test_an_idle_slab_goes_at_once_when_memory_is_short(keeper: Keeper, device: Device) -> None:
    """Somebody else has taken the rest of the device."""
    keeper.give(take(keeper, 500))
    device.held[1] = 450
    device.is_quiet = False
    assert not keeper.tidy(0.1)
    assert device.held == {1: 450}


def test_captures_without_a_slab_let_the_rest_go_too(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those that write straight to pinned memory: their graphs are held until some time after the last of them."""
    gone = []
    monkeypatch.setattr("vllm_tap.engine.capture.idle.time.monotonic", lambda: 0.0)
    keeper = Keeper(torch.device("cpu"), lambda: 0, lambda: True, lambda: gone.append(True))
    keeper.keep()
    keeper.give(None)
    assert keeper.tidy(LINGER_SECONDS - 0.1)
    keeper.keep()
    assert not keeper.tidy(LINGER_SECONDS + 0.1)
    assert gone == []
    keeper.give(None)
    assert not keeper.tidy(LINGER_SECONDS + 0.1)
    assert gone == [True]
    assert keeper.threads == 2


def test_a_keeper_whose_thread_cannot_begin_or_fails_has_another_after_the_next_capture(
    device: Device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A limit on threads, then a question that the driver does not answer: captures end all the same."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("vllm_tap.engine.capture.idle.time.monotonic", lambda: 0.0)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    keeper = SlabKeeper(torch.device("cpu"), lambda: 0, lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        keeper.give(take(keeper, 500))
    assert "can't start new thread" in caplog.text
    assert keeper.held_bytes == 500
    keeper._run()
    threads: list[threading.Thread] = []
    monkeypatch.setattr("vllm_tap.transport.threads._running", {})  # nobody waits for one that does not begin
    monkeypatch.setattr(threading.Thread, "start", lambda thread: threads.append(thread))
    keeper.give(take(keeper, 500))
    assert len(threads) == 1
    assert not keeper.tidy(LINGER_SECONDS + 0.1)
    assert device.held == {}
