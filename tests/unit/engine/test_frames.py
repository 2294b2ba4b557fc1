"""Room for frames: what a loop deep inside other calls costs."""

from __future__ import annotations

import resource
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from vllm_tap.vllm import runner as vllm_runner
from vllm_tap.vllm.frames import with_room

ROUNDS = 200
DEPTHS = range(1, 260)
"""So many small frames fill two chunks."""


def inner(a: int, b: int, c: int, d: int) -> int:
    return a + b + c + d


def middle() -> int:
    return inner(1, 2, 3, 4)


def faults_of_a_loop() -> int:
    """Return how many pages are taken from the system by calls that return at once."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(ROUNDS):
        middle()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def below(depth: int, function: Callable[[], int]) -> int:
    return below(depth - 1, function) if depth else function()


@with_room
def roomy() -> int:
    return faults_of_a_loop()


def test_a_loop_in_a_function_with_room_takes_no_memory_each_round() -> None:
    """However deep the function is called. Without room it does at some depth, on releases that keep no spare chunk."""
    plain, with_room_ = ([below(depth, function) for depth in DEPTHS] for function in (faults_of_a_loop, roomy))
    print(f"most page faults of {ROUNDS} rounds: {max(plain)} without room, {max(with_room_)} with room")
    assert max(with_room_) < ROUNDS // 2


def test_a_function_with_room_is_the_same_function() -> None:
    """With its name, its default values, and what it returns."""

    def add(first: int, second: int = 2) -> int:
        """Add."""
        return first + second

    assert with_room(add) is add
    assert (add(1), add(1, second=5), add.__name__, add.__doc__) == (3, 6, "add", "Add.")


class Runner:
    """A runner whose model has many layers, each of which calls something."""

    def execute_model(self, scheduler_output: object) -> int:
        return faults_of_a_loop()

    def prepare_inputs(self) -> None:
        """Do nothing."""

    sample_tokens = _dummy_run = prepare_inputs


def watched_runner() -> Runner:
    """Return a runner that is watched: that adds a frame on the way to the layers."""
    runner = Runner()
    vllm_runner.watch_runner(runner, vllm_runner.StepListener())
    return runner


OUTPUT = SimpleNamespace(scheduled_new_reqs=[], finished_req_ids=set(), total_num_scheduled_tokens=1)


def test_steps_of_a_runner_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each makes its own, however deep it is called."""
    monkeypatch.setattr(vllm_runner, "require_fields", lambda _: None)
    runner = watched_runner()
    assert max(below(depth, lambda: runner.execute_model(OUTPUT)) for depth in DEPTHS) < ROUNDS // 2
