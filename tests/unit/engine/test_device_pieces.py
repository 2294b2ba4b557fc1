"""Taps where a step replays many graphs, pieces of the model: switched between steps, made ready in pauses."""

from __future__ import annotations

import functools
import gc
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from simulated_cuda import SimulatedCuda
from simulated_engine import BLOCKS, DECODE, LLAMA, ROUTER, STEPS, Engine, Place, num_running
from vllm_tap.engine.cuda import graphs
from vllm_tap.engine.cuda.slab import LINGER_SECONDS


def num_with_taps(cuda: SimulatedCuda) -> int:
    """Return how many executable graphs have taps, switched on or off."""
    return sum(executable.num_taps > 0 for executable in cuda.executables.values())


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("edits", [0, 1, 2, 4])
def test_a_driver_that_refuses_to_edit_graphs_leaves_taps_in_them(
    cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture, edits: int, in_pieces: bool
) -> None:
    """The engine starts all the same, idle steps write nothing, and captures are right."""
    cuda.edits_left = edits
    engine = Engine(cuda, LLAMA, in_pieces)
    assert "taps stay in a CUDA graph while nobody captures" in caplog.text
    engine.idles_and_captures()
    assert cuda.conflicts == []


def test_taps_of_pieces_that_were_on_stay_until_a_pause(cuda: SimulatedCuda) -> None:
    """What nobody wants ends at once, and writes nothing; to disable it, and enable it again, would take longer."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    num_taps = len(LLAMA)
    found = [num_running(engine)]
    for leave_out in (2, 1, 2, 0, 1):
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE)
        engine.finish(session)
        found.append(num_running(engine))
    assert found == [0, num_taps - 2, num_taps - 1, num_taps - 1, num_taps, num_taps]
    engine.idles_and_captures()
    engine.model.rows.slabs.tidy(time.monotonic() + LINGER_SECONDS)
    assert num_running(engine) == 0
    engine.idles_and_captures()


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_a_capture_without_the_last_taps_of_the_one_before_gets_its_own_rows_alone(
    cuda: SimulatedCuda, places: list[Place], in_pieces: bool
) -> None:
    """In graphs that have taps of both, and outside: what the device knew of the last taps is gone."""
    engine = Engine(cuda, places, in_pieces)
    for leave_out_last in (0, 1, len(places) - 1, 0):
        session = engine.start(leave_out_last=leave_out_last)
        for step in STEPS[:3]:
            engine.step(session, step)
        engine.finish(session)
        first = engine.model.rows.first_tap
        on = [place - first for place in session._sink._place_of]  # type: ignore[attr-defined]
        table = engine.model.rows.tables.table[:, 0]
        assert (table >= 0).nonzero().flatten().tolist() == sorted(on)
    assert cuda.conflicts == []


@pytest.mark.parametrize("few_taps", [0, 1], ids=["copies", "switched"])
def test_several_pieces_of_a_step_may_fail(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, few_taps: int) -> None:
    """As where the device has no room to make them executable: that ends the capture, and the next one is right."""
    monkeypatch.setattr(graphs, "FEW_TAPS", few_taps)
    engine = Engine(cuda, LLAMA, in_pieces=True)
    session = engine.start()
    cuda.edits_left = cuda.instances_left = 0
    engine.step(session, DECODE)
    cuda.edits_left = cuda.instances_left = sys.maxsize
    engine.has_failed(session, "failed")


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_a_graph_that_cannot_be_launched_is_left_to_pytorch(cuda: SimulatedCuda, in_pieces: bool) -> None:
    """The step goes through the model as without a capture, which ends, and the next one is right."""
    engine = Engine(cuda, LLAMA, in_pieces)
    session = engine.start()
    engine.step(session, DECODE)
    before = {place: rows.clone() for place, rows in engine.model.made.items()}
    cuda.graphs_left = 0
    engine.step(session, DECODE)
    cuda.graphs_left = sys.maxsize
    for place, rows in engine.model.made.items():
        assert not torch.equal(rows, before[place]), f"{place} was not computed"
    engine.has_failed(session, "cuGraphLaunch failed")


@pytest.mark.parametrize("edits", [0, 1])
def test_taps_of_pieces_that_cannot_be_enabled_end_the_capture_alone(cuda: SimulatedCuda, edits: int) -> None:
    """The rest of them are enabled when the next capture begins."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    assert engine.model.rows.switch.complete_pieces(lambda: True)
    session = engine.start()
    cuda.edits_left = edits
    engine.step(session, DECODE)
    cuda.edits_left = sys.maxsize
    engine.has_failed(session, "cuGraphNodeSetEnabled failed")


def test_taps_of_pieces_that_cannot_be_disabled_stay(cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture) -> None:
    """The engine says so once; they are right, and only slower."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)
    cuda.edits_left = 1
    engine.model.rows.switch.forget()
    cuda.edits_left = sys.maxsize
    assert caplog.text.count("taps stay in a CUDA graph while nobody captures: cuGraphNodeSetEnabled failed") == 1
    assert num_running(engine) == len(LLAMA) - 1
    engine.idles_and_captures()
    engine.model.rows.switch.forget()
    assert num_running(engine) == 0


def test_a_piece_runs_the_taps_of_its_first_capture_alone(cuda: SimulatedCuda) -> None:
    """A piece has the taps of its layer's blocks too: a capture of hidden states does not pay for them."""
    engine = Engine(cuda, BLOCKS, in_pieces=True)
    for leave_out, num_on in ((2, 1), (0, 3)):
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE)
        engine.finish(session)
        assert num_running(engine) == num_on


def test_pieces_have_no_taps_until_a_capture_wants_these(cuda: SimulatedCuda) -> None:
    """An engine from which nobody captures holds no memory for them; what was made for captures is made once."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    held = len(cuda.executables), len(cuda.graphs)

    engine.model.run(len(DECODE))
    found = [num_with_taps(cuda)]
    for leave_out in (2, 2, 0, 1):
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE)
        engine.finish(session)
        assert (len(cuda.executables), len(cuda.graphs)) == held
        found.append(num_with_taps(cuda))
    assert found == [0, len(LLAMA) - 2, len(LLAMA) - 2, len(LLAMA), len(LLAMA)]


def test_pieces_are_made_ready_in_a_pause(cuda: SimulatedCuda) -> None:
    """After a capture, for all sizes of steps and all taps: no later step waits for them. A busy device gets none."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    switch = engine.model.rows.switch
    session = engine.start(leave_out=2)
    engine.step(session, DECODE)
    assert not switch.complete_pieces(lambda: True), "while somebody captures"
    engine.finish(session)
    before = num_with_taps(cuda)
    assert before == len(LLAMA) - 2
    for num_made in (0, 2):
        quiet = iter([True] * (num_made + 1) + [False])
        assert not switch.complete_pieces(lambda quiet=quiet: next(quiet))
        assert num_with_taps(cuda) == before + num_made
    assert switch.complete_pieces(lambda: True)
    assert num_with_taps(cuda) == sum(map(len, engine.model._graphs.values()))
    launches = cuda.num_launches
    engine.model.run(1)
    assert cuda.num_launches == launches, "taps are disabled until a capture wants them"
    made = max(cuda.executables)
    for leave_out in (0, 1):
        session = engine.start(leave_out=leave_out)
        for step in (DECODE, {"a": 1}, {"a": 1, "b": 1}):
            engine.step(session, step)
        engine.finish(session)
    assert max(cuda.executables) == made


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_what_is_executable_changes_between_steps_alone(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, in_pieces: bool
) -> None:
    """What another thread makes ready or gives up, a step may be about to launch."""
    engine = Engine(cuda, LLAMA, in_pieces)
    session = engine.start(leave_out=1)
    engine.step(session, DECODE)
    engine.finish(session)
    lock, calls = engine.model.step_lock, list[bool]()

    def watched(call: Callable[..., int], *args: Any) -> int:
        calls.append(lock.is_held)
        return call(*args)

    for name in ("cuGraphInstantiateWithFlags", "cuGraphNodeSetEnabled", "cuGraphExecDestroy"):
        monkeypatch.setattr(cuda, name, functools.partial(watched, getattr(cuda, name)))
    switch = engine.model.rows.switch
    switch.forget()
    assert len(calls) == 2  # two copies, or two pieces
    assert switch.complete_pieces(lambda: True)
    num_pieces = sum(map(len, engine.model._graphs.values())) if in_pieces else 2
    assert len(calls) == 2 + 3 * (num_pieces - 2)
    assert all(calls)


def test_pieces_are_made_ready_when_the_staging_memory_goes(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some seconds after the last capture, and later where the engine goes on; from an engine without one, never."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    rows = engine.model.rows
    engine.model.run(1)
    assert not rows.slabs.tidy(time.monotonic() + 2 * LINGER_SECONDS)
    assert num_with_taps(cuda) == 0
    engine.start().close()
    monkeypatch.setattr(rows, "is_quiet", lambda: False)
    assert rows.slabs.tidy(time.monotonic() + LINGER_SECONDS)
    assert (rows.staging_bytes, rows.is_preparing, num_with_taps(cuda)) == (0, True, 0)
    monkeypatch.setattr(rows, "is_quiet", lambda: True)
    assert not rows.slabs.tidy(time.monotonic())
    assert not rows.is_preparing
    assert num_with_taps(cuda) == len(cuda.executables)


@pytest.mark.parametrize(("limit", "allowed", "num_left_on"), [("instances_left", 1, 0), ("edits_left", 0, 1)])
def test_pieces_that_cannot_be_made_ready_wait_for_a_capture(
    cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture, limit: str, allowed: int, num_left_on: int
) -> None:
    """The engine goes on with what it has, and captures are right."""
    engine = Engine(cuda, LLAMA, in_pieces=True)
    setattr(cuda, limit, allowed)
    with caplog.at_level("INFO", "vllm_tap"):
        assert engine.model.rows.switch.complete_pieces(lambda: True), "there is no use in trying again and again"
    setattr(cuda, limit, sys.maxsize)
    assert caplog.text.count("made ready when a capture wants them") == 1
    launches = cuda.num_launches
    for num_rows in engine.model._graphs:
        engine.model.run(num_rows)
    assert cuda.num_launches - launches == num_left_on
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
def test_copies_of_graphs_go_with_these(cuda: SimulatedCuda, in_pieces: bool) -> None:
    """An engine may go while they are still kept for the next capture; a graph may be captured for a look alone."""
    engine = Engine(cuda, LLAMA, in_pieces)
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)
    assert cuda.executables
    before = len(cuda.graphs)
    num_copies = len(engine.model._graphs)
    engine.model._graphs.clear()
    gc.collect()
    assert not cuda.executables
    if not in_pieces:  # a piece is no copy
        assert len(cuda.graphs) <= before - num_copies
    assert engine.model.rows.switch.prepare(1)
    engine.model.rows.switch.forget()
