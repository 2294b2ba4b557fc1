"""What a listener sees of the steps of a runner."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.vllm import runner as vllm_runner


class Runner:
    """A runner of the second kind, which says what it does."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def prepare_inputs(self) -> Any:
        return SimpleNamespace(
            req_ids=["a"], query_start_loc_np=None, num_computed_tokens_np=None, positions=None, input_ids=None
        )

    def execute_model(self, scheduler_output: Any, dummy_run: bool = False) -> None:
        if scheduler_output.total_num_scheduled_tokens or dummy_run:
            self.prepare_inputs()
            self.said.append("forward")

    def sample_tokens(self) -> None:
        self.said.append("sample")

    def _dummy_run(self) -> None:
        self.said.append("forward")


def test_a_listener_sees_each_step_and_when_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the documentation; a step without tokens means idle, dummy runs mean that nothing is captured."""
    monkeypatch.setattr(vllm_runner, "require_fields", lambda _: None)
    runner, listener = Runner(), vllm_runner.StepListener()
    for name in ("before_forward", "after_forward", "after_sampling", "on_idle", "skip"):
        monkeypatch.setattr(listener, name, lambda *_, name=name: runner.said.append(name))
    vllm_runner.watch_runner(runner, listener)
    step, nothing = (
        SimpleNamespace(scheduled_new_reqs=[], finished_req_ids=set(), total_num_scheduled_tokens=n) for n in (3, 0)
    )
    runner.execute_model(step)
    runner.sample_tokens()
    runner.execute_model(nothing)
    runner.execute_model(nothing, dummy_run=True)
    runner._dummy_run()
    assert runner.said == [
        *["before_forward", "forward", "after_forward", "sample", "after_sampling"],
        *["after_forward", "on_idle"],
        *["skip", "before_forward", "forward"],
        *["skip", "forward"],
    ]
