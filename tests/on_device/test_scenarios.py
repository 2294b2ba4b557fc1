"""The scenarios of the simulated device on a real one: in graphs and outside, all bytes as the model made them."""

from __future__ import annotations

import random

import pytest

from real_cuda import RealCuda
from simulated_engine import LLAMA, REQUESTS, ROUTER, STEPS, Engine, Place
from unit.engine.test_device import (  # noqa: F401  # these run here, on the device of this folder
    test_a_rank_without_a_layer_of_the_capture_ships_nothing,
    test_a_step_whose_tokens_are_still_being_sampled_is_sent_with_the_next,
    test_bursts_of_any_steps_carry_what_the_model_made,
    test_only_rows_that_are_asked_for_are_written,
)
from unit.engine.test_device_experts import test_experts_that_are_tapped_one_by_one  # noqa: F401
from unit.engine.test_device_groups import (  # noqa: F401
    test_a_capture_beyond_its_budget_ends_alone,
    test_any_captures_come_and_go,
    test_captures_of_other_layers_positions_and_ways_overlap,
)
from unit.engine.test_device_pieces import (  # noqa: F401
    test_a_capture_without_the_last_taps_of_the_one_before_gets_its_own_rows_alone,
)
from vllm_tap.engine.cuda import group as device_group
from vllm_tap.engine.cuda import sink as device_sink

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("places", [LLAMA, ROUTER], ids=["llama", "router"])
@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("way", ["staged", "step by step", "ring", "direct"])
def test_rows_are_what_the_model_made(
    cuda: RealCuda, monkeypatch: pytest.MonkeyPatch, places: list[Place], way: str, in_pieces: bool
) -> None:
    """Steps in graphs and outside, of few and many rows, and captures after each other on the same memory."""
    if way == "ring":
        monkeypatch.setattr(device_sink, "WIDE_PLANE_BYTES", 1)
    if way == "step by step":
        monkeypatch.setattr(device_sink, "BURST_BYTES", 1)
        monkeypatch.setattr(device_group, "SMALL_BYTES", 0)
    engine = Engine(cuda, places, in_pieces)
    for steps in (STEPS, STEPS[:2], STEPS * 4):
        session = engine.start("direct" if way == "direct" else "staged")
        for step in steps:
            engine.step(session, step)
        engine.finish(session)


@pytest.mark.parametrize("in_pieces", [False, True], ids=["whole", "pieces"])
@pytest.mark.parametrize("seed", range(4))
def test_captures_of_any_layers_and_positions_after_each_other(cuda: RealCuda, seed: int, in_pieces: bool) -> None:
    """Taps are switched on and off between captures, and a capture gets the rows of its own layers alone."""
    choose = random.Random(seed)
    engine = Engine(cuda, LLAMA, in_pieces)
    for _ in range(6):
        session = engine.start(
            choose.choice(["staged", "direct"]),
            positions=choose.choice(["all", "generated", "last"]),
            leave_out=choose.randint(0, 1),
            leave_out_last=choose.randint(0, 1),
        )
        for _ in range(choose.randint(1, 20)):
            requests = choose.sample(sorted(REQUESTS), choose.randint(1, 4))
            engine.step(session, {request_id: choose.choice([1, 1, 1, 4]) for request_id in requests})
        engine.finish(session)
        engine.model.run(choose.choice([1, 3, 9]))  # idle
