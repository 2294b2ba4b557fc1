"""Captures on a simulated CUDA device: all bytes are as the model made them, in whatever order the device works."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from simulated_cuda import SimulatedCuda
from simulated_engine import BLOCKS, DECODE, LLAMA, REQUESTS, ROUTER, STEPS, Engine, Place
from vllm_tap.engine.capture import session as session_module
from vllm_tap.engine.cuda import driver as cuda_calls
from vllm_tap.engine.cuda import group as device_group
from vllm_tap.engine.cuda import sink as device_sink
from vllm_tap.engine.cuda.profile import DmaProfile
from vllm_tap.engine.cuda.ring import Ring
from vllm_tap.engine.cuda.slab import LINGER_SECONDS
from vllm_tap.errors import CaptureError
from vllm_tap.frame import layout as blocks


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("way", ["staged", "step by step", "ring", "direct"])
def test_rows_are_what_the_model_made_whatever_runs_first(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, places: list[Place], way: str, in_pieces: bool
) -> None:
    """Steps in graphs and outside, of few and many rows, and another capture: all bytes right, nothing unordered."""
    if way == "ring":
        monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", 1)
    if way == "step by step":
        monkeypatch.setattr(device_sink, "BURST_BYTES", 1)
        monkeypatch.setattr(device_group, "SMALL_BYTES", 0)
    engine = Engine(cuda, places, in_pieces)
    for steps in (STEPS, STEPS[:2]):
        session = engine.start("direct" if way == "direct" else "staged")
        for step in steps:
            engine.step(session, step)
        engine.finish(session)
    assert cuda.conflicts == []
    assert (cuda.num_copies == 0) == (way == "direct")


@pytest.mark.parametrize("way", ["staged", "ring", "direct"])
@pytest.mark.parametrize("later", [0, 1, 4])
def test_steps_go_on_while_rows_are_taken(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, way: str, later: int
) -> None:
    """Whoever takes them waits alone, for as many steps as there were: rows of later ones come with the next call."""
    if way == "ring":
        monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", 1)
    engine = Engine(cuda, LLAMA)
    session = engine.start("direct" if way == "direct" else "staged")
    others = [engine.start(requests=("b",)), session]
    takes = []
    for number, step in enumerate(STEPS):
        engine.step(others, step)
        if number % 3 == 2:
            waits = cuda.num_host_waits
            takes.append((number + later, engine.take(session)))
            assert cuda.num_host_waits == waits
        while takes and takes[0][0] <= number:
            takes.pop(0)[1]()
    for _, end in takes:
        end()
    for each in others:
        engine.finish(each)
    assert cuda.conflicts == []


def test_taps_may_have_counted_later_steps_when_their_counts_arrive(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The copy of the counts waits for large ones before it, and steps go on; not for more than were launched."""
    late: list[Callable[[], None]] = []
    copy_now = device_group.driver.memcpy_dtoh
    monkeypatch.setattr(
        device_group.driver, "memcpy_dtoh", lambda *copy: late.append(functools.partial(copy_now, *copy))
    )
    engine = Engine(cuda, LLAMA)
    session = engine.start("staged")

    def arrive() -> None:
        while late:
            late.pop()()

    for num_later in (1, 0, 3):
        engine.step(session, STEPS[0])
        end = engine.take(session)
        for step in STEPS[1 : 1 + num_later]:
            engine.step(session, step)
        arrive()
        end()
    engine.step(session, STEPS[0])
    end = engine.take(session)
    monkeypatch.setattr(session._sink, "_num_steps", 7)  # of the 8 that there were
    arrive()
    with pytest.raises(CaptureError, match="another number of steps"):
        end()


@pytest.mark.parametrize("places", [LLAMA, BLOCKS, ROUTER], ids=["llama", "blocks", "router"])
def test_a_step_leaves_the_device_in_one_copy(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, places: list[Place]
) -> None:
    """Labels and all planes of all streams lie in the staging as they will in the segment."""
    monkeypatch.setattr(device_sink, "BURST_BYTES", 1)
    engine = Engine(cuda, places)
    session = engine.start()
    for number, step in enumerate(STEPS[:5], 1):
        engine.step(session, step)
        assert cuda.num_copies == number
    engine.finish(session)


@pytest.mark.parametrize(
    ("places", "burst_steps", "chunk_steps", "sent"),
    [
        (LLAMA, 3, 64, [3, 6, 9, 12]),
        (LLAMA, 64, 5, [5, 10]),
        (LLAMA, 64, 64, []),
        (ROUTER, 64, 64, []),
    ],
)
def test_small_steps_leave_the_device_together(
    cuda: SimulatedCuda,
    monkeypatch: pytest.MonkeyPatch,
    places: list[Place],
    burst_steps: int,
    chunk_steps: int,
    sent: list[int],
) -> None:
    """As many as a burst or their piece of the segment has room for; the last ones when the capture ends."""
    monkeypatch.setattr(session_module, "STEPS_PER_CHUNK", chunk_steps)
    monkeypatch.setattr(device_sink, "DEPTHS", ((2, 16),))
    engine = Engine(cuda, places)
    session = engine.start()
    step_bytes = blocks.block_bytes(len(DECODE), session.streams)
    monkeypatch.setattr(device_sink, "BURST_BYTES", burst_steps * step_bytes)
    found = []
    for number in range(1, 14):
        before = cuda.num_copies
        engine.step(session, DECODE)
        found += [number] * (cuda.num_copies - before)
    assert found == sent
    engine.finish(session)
    assert cuda.num_copies == len(sent) + 1
    assert cuda.conflicts == []


@pytest.mark.parametrize("seed", range(6))
def test_bursts_of_any_steps_carry_what_the_model_made(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Runs of the same requests and changes of them, in bursts and pieces of segments of any length."""
    choose = random.Random(seed)
    monkeypatch.setattr(session_module, "STEPS_PER_CHUNK", choose.randint(1, 9))
    monkeypatch.setattr(device_sink, "BURST_BYTES", choose.choice([1, 1000, 4000, 1 << 20]))
    monkeypatch.setattr(device_sink, "DEPTHS", ((2, choose.randint(1, 4)),))
    engine = Engine(cuda, choose.choice([LLAMA, ROUTER]))
    session = engine.start()
    for _ in range(8):
        requests = choose.sample(sorted(REQUESTS), choose.randint(1, 4))
        step = {request_id: choose.choice([1, 1, 1, 4]) for request_id in requests}
        for _ in range(choose.randint(1, 4)):
            engine.step(session, step, sends=choose.random() < 0.9)
            if choose.random() < 0.1:
                engine.model.rows.clear()
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_dummy_run_between_steps_of_the_same_requests_writes_nothing(cuda: SimulatedCuda) -> None:
    """What the device was told of the step before is told again, also after it was told that nothing is wanted."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    for _ in range(3):
        engine.step(session, DECODE)
        engine.model.rows.clear()
        before = cuda.num_launches
        engine.model.run(len(DECODE))
        assert cuda.num_launches == before
        engine.step(session, DECODE)
    engine.finish(session)
    assert cuda.conflicts == []


def test_few_rows_of_a_large_step_take_few_programs(cuda: SimulatedCuda) -> None:
    """Outside graphs, kernels look at the chosen rows alone."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    before = cuda.num_programs
    engine.step(session, {"other": 18, "c": 2})
    assert cuda.num_programs - before == 2 * len(LLAMA)
    engine.finish(session)


def test_a_step_whose_tokens_are_still_being_sampled_is_sent_with_the_next(cuda: SimulatedCuda) -> None:
    """Nothing is lost where a runner begins a step before it has reported that the one before was sampled."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    for step in STEPS[:4]:
        engine.step(session, step, sends=False)
    engine.finish(session)
    assert cuda.conflicts == []


def test_only_rows_that_are_asked_for_are_written(cuda: SimulatedCuda) -> None:
    """The last position of each prompt: most steps have none, some have one among many tokens."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(positions="last")
    for _ in range(2):
        for step in STEPS[:7]:
            engine.step(session, step)
    assert 0 < len(engine.expected) < 14
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_rank_without_a_layer_of_the_capture_ships_nothing(cuda: SimulatedCuda) -> None:
    """Where ranks share the layers out, one may have none: no rows, and no labels that no tap would write."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(leave_out=len(LLAMA))
    for step in STEPS[:3]:
        engine.step(session, step)
    descriptor = session.finish()
    assert (descriptor.blocks, descriptor.chunks, session.num_rows) == (b"", (), 0)
    assert len(descriptor.requests) == 3
    session.close()


@pytest.mark.parametrize("staging", ["staged", "direct"])
def test_all_is_on_its_way_when_the_engine_rests(cuda: SimulatedCuda, staging: str) -> None:
    """Without a wait; nothing is left to queue for the end. More steps may come all the same."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(staging)
    for _ in range(2):
        for step in STEPS[:3]:
            engine.step(session, step)
        num_copies, waits = cuda.copies_left, cuda.num_host_waits
        session.on_idle()
        assert cuda.num_host_waits == waits
        assert num_copies - cuda.copies_left == (2 if staging == "staged" else 1), "rows and counts"
        num_copies = cuda.copies_left
        session.on_idle()
    engine.finish(session)
    assert cuda.copies_left == num_copies
    assert cuda.conflicts == []


@pytest.mark.parametrize("rests", [False, True])
def test_copies_are_timed_by_the_clock_of_the_device(cuda: SimulatedCuda, rests: bool) -> None:
    """Every copy by itself; behind the request for rows, only what was not queued before. No event is left behind."""
    engine = Engine(cuda, LLAMA)
    copy = cuda_calls.copy_to_host
    profile = DmaProfile()
    num_events = 0
    for _ in range(3):
        num_events = len(cuda.events)
        session = engine.start()
        for step in STEPS[:5]:
            engine.step(session, step)
        if rests:
            session.on_idle()
        engine.finish(session)
    assert len(cuda.events) == num_events
    figures = profile.stop()
    nbytes = figures["copy_bytes"]
    assert len(nbytes) == cuda.num_copies
    assert sum(nbytes) == cuda.now_ns
    np.testing.assert_allclose(figures["copy_seconds"], np.array(nbytes) / 1e9, rtol=1e-3)
    last = 0.0 if rests else nbytes[-1] / 1e9
    np.testing.assert_allclose(figures["after_forward"], [last] * 3, rtol=1e-3)
    assert figures["copying_after_forward"] == figures["after_forward"]
    assert cuda_calls.copy_to_host is copy
    session = engine.start("direct")
    engine.step(session, DECODE)
    engine.finish(session)
    assert profile.figures == figures


@pytest.mark.parametrize("way", ["staged", "ring"])
def test_staging_is_smaller_where_memory_is_short(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Room for one step at a time is enough: steps wait for the copies of the one before, on the device."""
    if way == "ring":
        monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", 1)
    engine = Engine(cuda, LLAMA)
    rows = engine.model.rows
    engine.start().close()
    usual = rows.staging_bytes
    rows.slabs.tidy(time.monotonic() + LINGER_SECONDS)
    assert rows.staging_bytes == 0
    cuda.free_bytes = usual - 1
    session = engine.start()
    assert usual / 2 <= rows.staging_bytes < usual
    for step in STEPS:
        engine.step(session, step)
    engine.finish(session)
    assert cuda.conflicts == []


def broken_capture(cuda: SimulatedCuda, steps: list[dict[str, int]]) -> list[str]:
    """Run a capture whose order was broken, and return what is unordered; its bytes may still be right."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    for step in steps:
        engine.step(session, step)
    engine.finish(session)
    return cuda.conflicts


def test_reusing_staging_without_waiting_is_noticed(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tap that overwrites what a copy may still read."""
    take = Ring.take

    def forgetful(self: Ring, size: int, stream: Any) -> int:
        self._busy.clear()
        return take(self, size, stream)

    monkeypatch.setattr(Ring, "take", forgetful)
    assert any("kernel _tap" in c and "from the device" in c for c in broken_capture(cuda, [{"c": 20}] * 3))


def test_a_copy_that_does_not_wait_for_the_forward_pass_is_noticed(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that may read before the taps have written."""
    monkeypatch.setattr(cuda_calls.Event, "wait", lambda *_: None)
    assert any("from the device" in c and "kernel _tap" in c for c in broken_capture(cuda, [DECODE]))


def test_rows_that_are_handed_over_too_early_are_noticed(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads before the last copy has ended."""
    monkeypatch.setattr(cuda_calls.Event, "synchronize", lambda _: None)
    assert any(c.startswith("client on host") for c in broken_capture(cuda, [DECODE]))
