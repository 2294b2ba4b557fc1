"""Rows that are taken while the engine goes on: steps run, and a capture may end, before the rows are there."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from host_worker import ServedEngine, prompts_of
from vllm_tap import Recording, Spec
from vllm_tap.client.collector import Collector
from vllm_tap.engine.capture.cpu import CpuSink
from vllm_tap.engine.capture.interfaces import Settling
from vllm_tap.errors import CaptureError

SPEC = Spec(hidden_states="all", embeddings=True)
DEADLINE_S = 10.0


class Copies:
    """Copies of rows that are on their way until somebody says so."""

    def __init__(self) -> None:
        self.are_awaited, self.are_over = threading.Event(), threading.Event()

    def wait(self) -> None:
        """Wait for them, as whoever takes rows does."""
        self.are_awaited.set()
        assert self.are_over.wait(DEADLINE_S), "nobody let the copies end"


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    """Those of all captures."""
    copies = Copies()
    monkeypatch.setattr(CpuSink, "queued", lambda _: Settling(copies.wait, lambda: None))
    return copies


@pytest.fixture
def engine() -> Iterator[ServedEngine]:
    """An engine of one worker."""
    engine = ServedEngine(random.Random(3))
    yield engine
    engine.close()


def test_steps_go_on_while_rows_are_on_their_way(engine: ServedEngine, copies: Copies) -> None:
    """Another capture begins, runs and ends before the rows of the first one are there, which are right."""
    recording, prompts = Recording(engine.connect(), SPEC), prompts_of(random.Random(1), 4)
    collector = Collector(recording)
    engine.run([recording], prompts)
    truth = dict(engine._engine.truth)
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(collector.take)
        assert copies.are_awaited.wait(DEADLINE_S)
        other = Recording(engine.connect(), SPEC)
        engine.run([other], others := prompts_of(random.Random(2), 3))
        assert other.finish([prompt.output() for prompt in others]).num_rows
        assert not taken.done()
        copies.are_over.set()
        taken.result()
    for number, prompt in enumerate(prompts):
        result = collector.result(number, prompt.output())
        for completion, request in enumerate(prompt.requests):
            sample = result.sample(0, completion)
            assert len(sample) == len(request.token_ids) - 1
            for layer, rows in sample.hidden_states.items():
                for position, row in enumerate(rows):
                    right = truth["hidden_states", request.name, layer, position]
                    assert row.contiguous().view(torch.uint8).numpy().tobytes() == right
    recording.stop()


def test_a_capture_may_end_while_its_rows_are_taken(engine: ServedEngine, copies: Copies) -> None:
    """Whoever takes them is told, and their memory is free."""
    recording = Recording(engine.connect(), SPEC)
    engine.run([recording], prompts_of(random.Random(1), 4))
    with ThreadPoolExecutor(1) as thread:
        taken = thread.submit(recording.take)
        assert copies.are_awaited.wait(DEADLINE_S)
        recording.stop()
        copies.are_over.set()
        with pytest.raises(CaptureError, match="ended while its rows were taken"):
            taken.result()
    (worker,) = engine.workers
    assert worker.status()["used_bytes"] == 0
