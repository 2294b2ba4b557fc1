"""Router logits and experts on a simulated CUDA device: by a kernel of their own, or taken together."""

from __future__ import annotations

import pytest

from simulated_cuda import SimulatedCuda
from simulated_engine import DECODE, EXPERTS, FOUR_ROUTERS, GRAPH_TOKENS, LLAMA, ROUTER, STEPS, Engine, Model, Place
from vllm_tap.engine.cuda import deferred_experts, kernel


@pytest.mark.parametrize("leave_out", [1, 2, 3])
def test_experts_in_part(cuda: SimulatedCuda, leave_out: int) -> None:
    """One kernel serves logits, ids and weights of a layer; of one layer only some are wanted here."""
    engine = Engine(cuda, ROUTER)
    session = engine.start(leave_out=leave_out)
    before = cuda.num_launches
    engine.step(session, DECODE)
    engine.step(session, {"a": 6, "b": 5})
    assert cuda.num_launches - before == 2 * 3
    engine.finish(session)
    assert cuda.conflicts == []


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("large", [False, True], ids=["row by row", "several rows a program"])
@pytest.mark.parametrize(("leave_out", "num_taps"), [(0, 4 + 1), (1, 3 + 1), (2, 3 + 1), (4, 3 + 1), (5, 2 + 1)])
def test_one_kernel_at_the_end_of_a_graph_takes_the_experts_of_all_layers(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, leave_out: int, num_taps: int, large: bool, in_pieces: bool
) -> None:
    """Where what they made can be held until there; beside it, each layer has a tap of its hidden states."""
    if large:
        monkeypatch.setattr(kernel, "LARGE_ROWS", 1)
    engine = Engine(cuda, FOUR_ROUTERS, in_pieces, keeps_tensors=True)
    session = engine.start(leave_out=leave_out)
    for step in STEPS[:7]:
        engine.step(session, step)
    assert {executable.num_taps for executable in cuda.executables.values()} == ({0, 1} if in_pieces else {num_taps})
    engine.finish(session)
    assert cuda.conflicts == []
    assert engine.model.rows.switch.held == []


@pytest.mark.parametrize(("num_layers", "num_taps"), [(0, 4 + 4), (1, 4 + 4), (2, 4 + 2), (3, 4 + 2), (4, 4 + 1)])
def test_no_more_is_held_than_the_engine_can_spare(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, num_layers: int, num_taps: int
) -> None:
    """Where the layers of a graph hold more, a kernel in the middle takes those before it.

    A graph of half as many rows as the largest, as the one here, holds half of what one of no rows might.
    """
    row_bytes = sum(place.width * place.dtype.itemsize for place in ROUTER[1:4])
    monkeypatch.setattr(deferred_experts, "MAX_HELD_BYTES", 2 * GRAPH_TOKENS * row_bytes * num_layers)
    engine = Engine(cuda, FOUR_ROUTERS, keeps_tensors=True)
    session = engine.start()
    for step in STEPS[:7]:
        engine.step(session, step)
    assert max(executable.num_taps for executable in cuda.executables.values()) == num_taps
    engine.finish(session)


def test_layers_whose_experts_differ_share_no_kernel(cuda: SimulatedCuda) -> None:
    """As of a model with more experts in some layers: two are of one kind here, and captured; two of another."""
    others = [place._replace(width=3) for place in FOUR_ROUTERS if place.layer < 2 and place.stream in EXPERTS]
    places = [next((o for o in others if o[:2] == place[:2]), place) for place in FOUR_ROUTERS]
    engine = Engine(cuda, places, keeps_tensors=True)
    (whole,) = {len(graph.taps) for graph in cuda.graphs.values() if graph.taps}
    assert whole == 4 + 2
    session = engine.start(leave_out=8)
    for step in STEPS[:5]:
        engine.step(session, step)
    assert {executable.num_taps for executable in cuda.executables.values()} == {2 + 1}
    engine.finish(session)


@pytest.mark.parametrize("why", ["memory serves again", "a row starts anywhere", "no room"])
def test_experts_are_taken_layer_by_layer_where_they_cannot_be_held(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    """As where a compiled graph made the logits, or a tensor is a part of another that starts at any address."""
    if why == "a row starts anywhere":
        monkeypatch.setattr(deferred_experts, "can_gather", lambda _: False)
    if why == "no room":
        monkeypatch.setattr(deferred_experts, "MAX_GRAPHS", 0)
    engine = Engine(cuda, ROUTER, keeps_tensors=why != "memory serves again")
    session = engine.start()
    engine.step(session, DECODE)
    assert {executable.num_taps for executable in cuda.executables.values()} == {2 + 2}
    engine.finish(session)


def test_a_kernel_that_cannot_be_put_at_the_end_of_a_graph_ends_captures_alone(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine starts and runs; who wants to capture is told."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(deferred_experts, "launch_gather_experts", fails)
    engine = Engine(cuda, ROUTER, keeps_tensors=True)
    assert "no such kernel" in engine.model.rows.refusal
    engine.model.run(3)


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
def test_rows_may_be_kept_to_be_looked_at_while_they_are_captured(cuda: SimulatedCuda, places: list[Place]) -> None:
    """As where the first rows did not tell how a router chooses: nothing else is done in such a step."""
    engine = Engine(cuda, places)
    session = engine.start()
    taps = engine.model.taps.values()
    for tap in taps:
        tap.keep_probe = tap.keep_one_probe = True
    before = cuda.num_launches
    engine.step(session, STEPS[0])
    launched = cuda.num_launches - before
    assert all(tap.probe is not None and not tap.keep_probe for tap in taps)
    engine.step(session, STEPS[0])
    assert cuda.num_launches - before == 2 * launched
    engine.finish(session)
    assert cuda.conflicts == []


def test_experts_that_are_tapped_one_by_one(cuda: SimulatedCuda) -> None:
    """As where a router may change the logits that it is given."""
    engine = Engine(cuda, ROUTER, joins_experts=False)
    session = engine.start()
    for step in STEPS[:5]:
        engine.step(session, step)
    engine.finish(session)
    assert cuda.conflicts == []


def test_memory_that_serves_again_too_early_is_noticed(cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that makes its tensors where those of another are held until the end of the graph."""
    monkeypatch.setattr(Model, "is_held", lambda *_: False)
    engine = Engine(cuda, FOUR_ROUTERS, keeps_tensors=True)
    session = engine.start()
    engine.step(session, DECODE)
    with pytest.raises(AssertionError, match="router_logits"):
        engine.finish(session)
