"""Several captures at once on a simulated CUDA device: each gets its own rows, and none minds the others."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from simulated_cuda import SimulatedCuda
from simulated_engine import CAPTURED, DECODE, FOUR_ROUTERS, LLAMA, ROUTER, STEPS, Engine, Place, copies_of
from vllm_tap.engine.capture.session import Session
from vllm_tap.engine.cuda import sink as device_sink
from vllm_tap.engine.cuda.kernel import MAX_GROUPS
from vllm_tap.errors import BudgetError, CaptureError
from vllm_tap.frame import messages


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_captures_of_other_layers_positions_and_ways_overlap(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, places: list[Place], in_pieces: bool
) -> None:
    """They begin and end at different steps, in graphs and outside, by blocks, by planes and directly."""
    monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", 1 if in_pieces else 600)
    engine = Engine(cuda, places, in_pieces)
    begin = {
        0: lambda: engine.start("staged", requests=("a", "b")),
        2: lambda: engine.start("direct", leave_out=1),
        4: lambda: engine.start("staged", positions="last", leave_out_last=1, requests=CAPTURED),
        9: lambda: engine.start("direct", positions="generated", requests=("c",)),
    }
    sessions: list[Session] = []
    for number, step in enumerate(STEPS):
        if number in begin:
            sessions.append(begin[number]())
        if number in (8, 12):
            engine.finish(sessions.pop(0))
        engine.step(sessions, step)
    assert len(sessions) == 2
    for session in sessions:
        assert session.num_rows
        engine.finish(session)
    assert cuda.conflicts == []
    assert engine.model.rows.groups == []


@pytest.mark.parametrize("seed", range(4))
def test_any_captures_come_and_go(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """At random, beside dummy runs; graphs of whole models whose experts share kernels among them."""
    choose = random.Random(seed)
    monkeypatch.setattr(device_sink, "BURST_BYTES", choose.choice([1, 1000, 1 << 20]))
    engine = Engine(cuda, choose.choice([LLAMA, FOUR_ROUTERS]), seed % 2 == 1, keeps_tensors=seed % 2 == 0)
    sessions: list[Session] = []
    for _ in range(10):
        if len(sessions) < 4 and choose.random() < 0.5:
            requests = choose.sample(CAPTURED, choose.randint(1, 3))
            kinds = choose.choice(["staged", "direct"]), choose.choice(["all", "generated", "last"])
            sessions.append(engine.start(*kinds, choose.randint(0, 1), choose.randint(0, 1), requests=requests))
        if sessions and choose.random() < 0.2:
            engine.finish(sessions.pop(choose.randrange(len(sessions))))
        engine.step(sessions, choose.choice([*STEPS, DECODE, DECODE]), sends=choose.random() < 0.9)
        if choose.random() < 0.1:
            engine.model.rows.clear()
    while sessions:
        engine.finish(sessions.pop())
    assert cuda.conflicts == []


@pytest.mark.parametrize(("staging", "wide"), [("staged", 1), ("staged", 1 << 20), ("direct", 600)])
def test_rows_beyond_the_budget_go_to_files(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, staging: str, wide: int
) -> None:
    """Beside a capture that has room; on every way of staging, and nothing is copied into memory that is used again."""
    monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", wide)
    engine = Engine(cuda, LLAMA)
    rich = engine.start(staging)
    poor = engine.start(staging, budget_bytes=32 << 10, spill=messages.Spill(str(tmp_path), 64 << 20))
    for step in STEPS:
        engine.step([rich, poor], step)
        assert poor.account.used_bytes <= 32 << 10
    assert poor.stalled_seconds > 0
    assert engine.pool.area_bytes > 0
    engine.finish(poor)
    assert engine.pool.area_bytes == 0
    engine.finish(rich)
    assert cuda.conflicts == []


def test_a_capture_beyond_its_budget_ends_alone(cuda: SimulatedCuda) -> None:
    """The other one, of the same client, has its own."""
    engine = Engine(cuda, LLAMA)
    rich, poor = engine.start(), engine.start(budget_bytes=8192)
    for step in STEPS[:7]:
        engine.step([rich, poor], step)
    with pytest.raises(BudgetError, match="of budget_bytes=8192 are in use"):
        poor.finish()
    engine.abandon(poor)
    engine.step(rich, DECODE)
    engine.finish(rich)
    assert cuda.conflicts == []


def test_a_tap_that_fails_ends_the_captures_that_want_it(cuda: SimulatedCuda) -> None:
    """Outside graphs; those of other layers go on."""
    engine = Engine(cuda, LLAMA)
    hit, spared = engine.start(), engine.start(leave_out_last=1)
    make, last = engine.model._make, LLAMA[-1]
    engine.model._make = (  # type: ignore[method-assign]
        lambda place, *rest: (
            tuple(x if x is None else x[:-1] for x in make(place, *rest)) if place == last else make(place, *rest)
        )
    )
    engine.step([hit, spared], STEPS[0])
    with pytest.raises(CaptureError, match="passed 15 rows in a step of at least 16"):
        hit.finish()
    engine.abandon(hit)
    engine.finish(spared)


def test_there_is_room_for_so_many(cuda: SimulatedCuda) -> None:
    """The next one is refused with nothing taken, and comes in when one has ended."""
    engine = Engine(cuda, LLAMA)
    sessions = [engine.start("direct", requests=("a",)) for _ in range(MAX_GROUPS)]
    with pytest.raises(CaptureError, match=f"{MAX_GROUPS} captures are under way in this engine, as many as a GPU"):
        engine.start()
    assert engine.model.rows.staging_bytes == 0
    engine.step(sessions, DECODE)
    engine.finish(sessions.pop(3))
    sessions.append(engine.start())
    engine.step(sessions, DECODE)
    for session in sessions:
        engine.finish(session)
    assert cuda.conflicts == []


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_a_capture_alone_has_the_kernels_to_itself(cuda: SimulatedCuda, in_pieces: bool) -> None:
    """Programs for others are not even launched, in graphs and outside; one kernel serves several captures."""
    engine = Engine(cuda, LLAMA, in_pieces)

    def count(*sessions: Session) -> tuple[int, int]:
        before = cuda.num_launches, cuda.num_programs
        engine.step(sessions, DECODE)
        return cuda.num_launches - before[0], cuda.num_programs - before[1]

    alone = engine.start()
    assert count(alone) == (3, 3 * 4)
    both = alone, engine.start()
    assert count(*both) == (3, 2 * 3 * 4)
    engine.finish(both[1])
    # What is in pieces stays as it is until a pause: to change it takes longer than it costs.
    assert count(alone) == (3, (2 if in_pieces else 1) * 3 * 4)
    engine.finish(alone)
    if not in_pieces:
        assert max(len(copy._forms) for copy in copies_of(engine)) == 2
