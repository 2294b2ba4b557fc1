"""Taps in CUDA graphs of a simulated device: in steps with rows alone, made ready while the device is busy."""

from __future__ import annotations

import gc
import itertools
import sys
import time

import pytest
import torch

import simulated_engine
from simulated_cuda import HOST_CALL, INVALID_VALUE, KERNEL, SimulatedCuda
from simulated_engine import DECODE, LLAMA, Engine, Model, Place, copies_of, num_running
from vllm_tap.engine.cuda import graphs
from vllm_tap.engine.cuda.slab import LINGER_SECONDS
from vllm_tap.engine.cuda.tapped_graph import MOST_FORMS, NOTHING
from vllm_tap.errors import DeviceError


def test_taps_in_graphs_run_only_in_steps_with_rows(cuda: SimulatedCuda) -> None:
    """Steps that have none replay a graph without taps; a row that comes later is not missed."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(positions="generated")
    for computed, runs in ((0, 0), (12, len(LLAMA)), (0, 0), (0, 0), (12, len(LLAMA))):
        before = cuda.num_launches
        engine.step(session, {"a": 3}, computed=[computed])
        assert cuda.num_launches - before == runs
    engine.finish(session)
    assert cuda.conflicts == []


def test_a_graph_that_cannot_be_made_ends_the_capture_alone(cuda: SimulatedCuda) -> None:
    """The step runs without taps; the client is told why its rows are missing, and the next capture is right."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    cuda.instances_left = 0
    engine.step(session, DECODE)
    cuda.instances_left = sys.maxsize
    with pytest.raises(DeviceError, match="cuGraphInstantiate failed: CUDA_ERROR_INVALID_VALUE"):
        session.finish()
    session.close()
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)


@pytest.mark.parametrize("missing", ["raw_cuda_graph", "_cuda_getCurrentRawStream"])
def test_a_pytorch_that_does_not_let_graphs_be_edited_leaves_taps_in_them(
    cuda: SimulatedCuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    """One without what is needed of it: the engine starts all the same, and captures are right."""
    owner = torch.cuda.CUDAGraph.__mro__[1] if missing == "raw_cuda_graph" else torch._C
    with monkeypatch.context() as patch, caplog.at_level("INFO", "vllm_tap"):
        patch.delattr(owner, missing)
        engine = Engine(cuda, LLAMA)
    assert "CUDA graphs cannot be edited here" in caplog.text
    engine.idles_and_captures()
    assert cuda.conflicts == []


def test_graphs_that_are_thrown_away_leave_nothing_behind(cuda: SimulatedCuda) -> None:
    """The V1 runner captures some first, to see how much memory they take; the driver gives their handles to others."""
    model = Model(cuda, LLAMA)
    thrown_away = torch.cuda.CUDAGraph(keep_graph=True)
    thrown_away.capture_begin()
    model.forward(2)
    thrown_away.capture_end()
    handle = thrown_away.raw_cuda_graph()
    del cuda.graphs[handle]
    cuda.handles = itertools.chain([handle], cuda.handles)
    model.capture_graphs()
    assert handle in cuda.graphs
    before = cuda.num_launches
    model.run(1)
    assert cuda.num_launches == before


@pytest.mark.parametrize("case", ["kernels", "no kernels", "refused"])
def test_kernels_after_taps_start_early_where_that_is_allowed(cuda: SimulatedCuda, case: str) -> None:
    """Only kernels can, only where a driver can say so, and not the last: the end of a graph awaits all taps."""
    if case == "no kernels":
        cuda.kind_of_work = HOST_CALL
    if case == "refused":
        cuda.cuGraphRemoveDependencies_v2 = lambda *_: INVALID_VALUE  # type: ignore[method-assign]
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    engine.step(session, DECODE)
    assert {executable.num_early for executable in cuda.executables.values()} == {2 if case == "kernels" else 0}
    engine.finish(session)
    assert cuda.conflicts == []


class Adjacent(Model):
    """A layer whose rows pass a second tap right behind the first, with no other work between."""

    def _make(self, place: Place, number: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if place.stream == "mlp_output":
            self._last = super()._make(place, number, num_tokens)
        return self._last

    def run(self, num_tokens: int) -> None:
        super().run(num_tokens)
        self.made["hidden_states", 0] = self.made["mlp_output", 0]


ADJACENT = [Place(stream, 0, 24, torch.bfloat16, False) for stream in ("mlp_output", "hidden_states")]


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("kind", [KERNEL, HOST_CALL], ids=["a kernel", "no kernel"])
def test_taps_right_behind_one_another_come_out_one_by_one(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: int, in_pieces: bool
) -> None:
    """Also behind what is no kernel, such as a copy, after which nothing may start early."""
    cuda.kind_of_work = kind
    monkeypatch.setattr(simulated_engine, "Model", Adjacent)
    if not in_pieces:
        monkeypatch.setattr(graphs, "FEW_TAPS", 0)
    engine = Engine(cuda, ADJACENT, in_pieces)
    assert "taps stay in a CUDA graph" not in caplog.text
    for leave_out, leave_out_last in ((0, 0), (1, 0), (0, 1)):
        session = engine.start(leave_out=leave_out, leave_out_last=leave_out_last)
        for _ in range(3):
            engine.step(session, DECODE)
        engine.finish(session)
    assert cuda.conflicts == []


def test_a_graph_is_kept_for_a_few_sets_of_taps(cuda: SimulatedCuda) -> None:
    """Captures of other layers get graphs of their own, made once as long as they are not too many."""
    engine = Engine(cuda, [Place("hidden_states", layer, 24, torch.bfloat16, True) for layer in range(6)])

    def made_by(leave_out: int) -> int:
        before = max(cuda.executables, default=0)
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE, computed=[12] * len(DECODE))
        engine.finish(session)
        assert len(cuda.executables) <= 2 * MOST_FORMS
        return sum(executable > before for executable in cuda.executables)

    # Each time that of the step, and that of the next smaller size.
    assert [made_by(leave_out) for leave_out in (0, 1, 2, 3, 1, 0)] == [2, 2, 2, 2, 0, 0]
    num_graphs = len(cuda.graphs)
    assert [made_by(leave_out) for leave_out in (4, 3, 0, 0)] == [2, 0, 2, 0]
    assert len(cuda.graphs) == num_graphs
    engine.model.rows.slabs.tidy(time.monotonic() + LINGER_SECONDS)
    assert not cuda.executables, "made for captures, and kept when the staging memory has gone"
    assert [made_by(leave_out) for leave_out in (0, 0)] == [2, 0]


def test_graphs_are_made_while_the_device_is_busy(cuda: SimulatedCuda) -> None:
    """For the step that follows, and then for one of fewer rows; a step that finds its own does not wait.

    Not while prompts have tokens left: the step that follows has no use for any.
    """
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    for step, computed, ready in (
        ({"a": 6, "b": 5}, (0, 0), set()),
        ({"a": 5, "b": 1}, (6, 5), {2}),
        ({"a": 1, "b": 1}, (11, 6), {2, 1}),
        ({"a": 1, "b": 1, "c": 3}, (12, 7, 0), {2, 1}),
        ({"a": 1, "b": 1, "c": 4}, (13, 8, 3), {4, 2, 1}),
        ({"a": 1, "b": 1, "c": 1}, (14, 9, 7), {4, 2, 1}),
    ):
        engine.step(session, step, computed=computed)
        assert {copy.num_rows for copy in copies_of(engine) if copy._forms} == ready
        assert len(cuda.executables) == len(ready)
    engine.finish(session)
    assert cuda.conflicts == []


def test_graphs_that_are_gone_hide_none_that_are_there(cuda: SimulatedCuda) -> None:
    """Those of another size may be captured anew: the next larger one is made ahead nevertheless."""
    engine = Engine(cuda, LLAMA)
    sizes = sorted({copy.num_rows for copy in copies_of(engine)})
    smallest, gone, next_one = sizes[:3]
    engine.model._graphs = {size: graphs for size, graphs in engine.model._graphs.items() if size != gone}
    gc.collect()
    session = engine.start()
    engine.step(session, DECODE)
    for copy in copies_of(engine):
        copy.forget()
    switch = engine.model.rows.switch
    switch._prepared = 0, NOTHING
    while switch.prepare(gone):
        pass
    assert {copy.num_rows for copy in copies_of(engine) if copy._forms} == {smallest, next_one}
    engine.finish(session)


def test_graphs_that_are_made_ahead_have_room_for_drafts(cuda: SimulatedCuda) -> None:
    """A step has more than one token of each request."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(num_drafts=1)
    engine.step(session, {"a": 6, "b": 5}, computed=[5, 0])
    assert {copy.num_rows for copy in copies_of(engine) if copy._forms} == {4}
    engine.finish(session)


@pytest.mark.parametrize(("positions", "generates"), [("last", True), ("all", False)])
def test_no_graphs_are_made_ahead_for_captures_of_prompts(cuda: SimulatedCuda, positions: str, generates: bool) -> None:
    """Steps of generated tokens have no rows for them, or there are none."""
    engine = Engine(cuda, LLAMA)
    session = engine.start(positions=positions, generates=generates)
    engine.step(session, {"a": 11}, computed=[0])
    assert len(engine.expected) == 1
    assert not cuda.executables
    engine.finish(session)


def test_a_graph_that_cannot_be_made_ahead_is_made_when_it_is_needed(cuda: SimulatedCuda) -> None:
    """Nothing is said before that: the step that needs it tells the client what is wrong, if it still is."""
    engine = Engine(cuda, LLAMA)
    session = engine.start()
    cuda.instances_left = 0
    engine.step(session, {"a": 11})
    cuda.instances_left = sys.maxsize
    engine.step(session, DECODE)
    engine.finish(session)
    assert cuda.conflicts == []


def test_taps_in_graphs_run_only_for_their_layers_and_only_while_somebody_captures(cuda: SimulatedCuda) -> None:
    """Those of other taps are taken out of a graph, and all of them once it is idle."""
    engine = Engine(cuda, LLAMA)
    assert num_running(engine) == 0
    for leave_out in (1, 0, 2):
        session = engine.start(leave_out=leave_out)
        before = cuda.num_launches
        engine.step(session, DECODE)
        assert cuda.num_launches - before == len(LLAMA) - leave_out
        engine.finish(session)
        assert num_running(engine) == 0


def test_a_graph_that_could_not_be_given_up_is_not_launched_again(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two executable forms the driver destroys one, and refuses the other."""
    engine = Engine(cuda, LLAMA)
    for leave_out in (1, 0):
        session = engine.start(leave_out=leave_out)
        engine.step(session, DECODE)
        engine.finish(session)
    copy = next(copy for copy in copies_of(engine) if len(copy._forms) == 2)
    destroy, refusals = SimulatedCuda.cuGraphExecDestroy, iter([False, True])
    monkeypatch.setattr(
        SimulatedCuda, "cuGraphExecDestroy", lambda *args: 1 if next(refusals, False) else destroy(*args)
    )
    with pytest.raises(DeviceError, match="cuGraphExecDestroy failed"):
        copy.forget()
    session = engine.start()
    engine.step(session, DECODE)
    engine.finish(session)
