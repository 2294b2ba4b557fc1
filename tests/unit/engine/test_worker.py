"""What a worker does with requests whose capture it does not know yet. Without an engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.engine import worker as module
from vllm_tap.engine.worker import TapWorker
from vllm_tap.labels import Mark
from vllm_tap.transport.calls import Caller, CallServer

DEADLINE_S = 10.0


class SlowWorker(TapWorker):
    """Takes its time over a call, and then has the capture that the call names."""

    def __init__(self) -> None:
        super().__init__(SimpleNamespace(rank=0))
        self.num_settled = 0
        self._servers: Any = CallServer(self._begin)
        self.server: CallServer = self._servers
        settle = self.server.settle

        def counted(timeout_s: float) -> bool:
            self.num_settled += 1
            return settle(timeout_s)

        self.server.settle = counted  # type: ignore[method-assign]

    def _begin(self, data: bytes) -> bytes:
        time.sleep(0.05)
        with self.lock:
            session: Any = SimpleNamespace()
            self._sessions[data.decode()] = session
        return data


@pytest.fixture
def worker() -> Iterator[SlowWorker]:
    """A worker with a server of calls."""
    worker = SlowWorker()
    yield worker
    worker.server.close()


def test_a_step_waits_for_the_capture_that_its_requests_belong_to(worker: SlowWorker) -> None:
    """The client sends both, one after the other, and waits for neither."""
    caller = Caller(worker.server.address)
    caller.send(b"x")
    worker.expect([Mark("x", 0, 1)])
    assert "x" in worker._sessions
    worker.expect([Mark("x", 1, 1)])
    worker.expect([])
    assert worker.num_settled == 1, "a capture that is known needs no wait"
    caller.close()


def test_a_step_does_not_wait_for_what_nobody_sent(worker: SlowWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks of a capture that has ended, or that somebody made up."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", DEADLINE_S)
    begin = time.monotonic()
    worker.expect([Mark("unknown", 0, 1)])
    assert worker.num_settled == 1
    assert time.monotonic() - begin < DEADLINE_S / 2
