"""Rows of a request while it runs, by the captures that requests share: when they come, and what is left of them.

No engine runs: what it would do is done here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_tap.client import live
from vllm_tap.client.lives import Lives
from vllm_tap.client.tasks import Tasks
from vllm_tap.serve.files import FileReply
from vllm_tap.spec import Spec

prometheus = pytest.importorskip("prometheus_client")

from vllm_tap.serve.metrics import Metrics  # noqa: E402
from vllm_tap.serve.running import Running  # noqa: E402

ALL = Spec(hidden_states=[1], positions="all")
PROMPT_ROWS = Spec(hidden_states=[1], positions="prompt")
PROMPT = [1, 2, 3]
GAP_S = 0.02


class Collector:
    """Rows of no engine.

    Attributes:
        num_takes: Calls to workers.
    """

    def __init__(self, recording: Any) -> None:
        self.num_takes = 0

    def take(self) -> None:
        """Count a call."""
        self.num_takes += 1

    def rows_until(self, sample: int, tokens: Any, begin: int, end: int) -> Any:
        """Return rows of these positions."""
        wanted = np.arange(begin, end)
        sequences = SimpleNamespace(wanted_starts=[0, len(wanted)], wanted=wanted, token_ids=np.arange(100))
        rows = torch.zeros(len(wanted), 2)
        return SimpleNamespace(
            num_rows=len(wanted), sequences=sequences, layers={"hidden_states": [1]},
            rows=lambda stream, layer, start, stop: rows[start:stop], span=(begin, end),
        )  # fmt: skip

    def drop(self, sample: int) -> None:
        """Let go of nothing."""

    def close(self) -> None:
        """Let go of nothing."""


class Reply:
    """Takes rows, and says when they came."""

    def __init__(self, has_readers: bool) -> None:
        self.fields: dict[str, Any] = {}
        self.has_readers = has_readers
        self.spans: list[tuple[int, int]] = []

    def expect(self) -> int:
        """Return the number of the only prompt."""
        return 0

    async def add(self, prompt: int, captured: Any, finished: bool) -> tuple[int, int]:
        """Take rows."""
        self.spans.append(captured.span)
        return captured.num_rows, 1

    def end(self, prompt: int, tokens: Any, error: str = "") -> str:
        """End."""
        return error

    def close(self) -> None:
        """End."""


@pytest.fixture
def collectors(monkeypatch: pytest.MonkeyPatch) -> list[Collector]:
    """Return the collectors of captures that begin."""
    made: list[Collector] = []
    recording = SimpleNamespace(
        mark=lambda params, sample: params, row_bytes=1, forget_marked=lambda sample: None, stop=lambda: None
    )

    def new_collector(recording: Any) -> Collector:
        made.append(Collector(recording))
        return made[-1]

    monkeypatch.setattr(live, "Recording", lambda connection, spec, **options: recording)
    monkeypatch.setattr(live, "Collector", new_collector)
    monkeypatch.setattr(new_collector, "close", Collector.close, raising=False)
    return made


def running(reply: Any) -> Running:
    """Return a request of one completion, whose outputs have their new tokens alone."""
    params = SimpleNamespace(n=1, output_kind=SimpleNamespace(name="DELTA"))
    return Running(reply, params, Metrics(prometheus.CollectorRegistry()), Tasks())


def output(finished: bool = False) -> Any:
    """Return an output of one more token."""
    one = SimpleNamespace(index=0, token_ids=[7])
    return SimpleNamespace(
        request_id="", finished=finished, prompt_token_ids=PROMPT, outputs=[one], kv_transfer_params=None
    )


def run(function: Callable[[Lives], Coroutine[Any, Any, None]]) -> None:
    """Run a function of captures of a connection to nobody."""

    async def whole() -> None:
        await function(Lives(SimpleNamespace(may_change=False)))  # type: ignore[arg-type]

    asyncio.run(whole())


@pytest.mark.parametrize("has_readers", [True, False])
def test_rows_come_with_each_token_while_somebody_reads(collectors: list[Collector], has_readers: bool) -> None:
    """Else all at the end, if that is soon. They are gapless, and the last token waits for no rest."""

    async def whole(lives: Lives) -> None:
        reply = Reply(has_readers)
        async with lives.request(ALL, None) as request:
            of_request = running(reply)
            for number in range(5):
                await of_request.take(request, output())
                await asyncio.sleep(GAP_S)
                if has_readers:
                    assert reply.spans[-1][1] == 3 + number
            begin = time.monotonic()
            await of_request.take(request, output(finished=True))
            assert time.monotonic() - begin < live.REST_S / 2
        assert [reply.spans[0][0], reply.spans[-1][1]] == [0, 8]
        assert all(one[1] == two[0] for one, two in zip(reply.spans, reply.spans[1:], strict=False))
        assert len(reply.spans) == (6 if has_readers else 1)

    run(whole)


def test_the_last_output_behind_the_first_waits_for_no_rest(collectors: list[Collector]) -> None:
    """Before the task of its rows has had a turn."""

    async def whole(lives: Lives) -> None:
        reply = Reply(has_readers=False)
        async with lives.request(ALL, None) as request:
            of_request = running(reply)
            await of_request.take(request, output())
            begin = time.monotonic()
            await of_request.take(request, output(finished=True))
            assert time.monotonic() - begin < live.REST_S / 2
        assert reply.spans == [(0, 4)]

    run(whole)


def test_one_that_is_read_does_not_have_the_rows_of_all_others_taken(collectors: list[Collector]) -> None:
    """Those are taken a few times a second, all of them by one call."""
    seconds, num_requests = 4 * live.REST_S, 16

    async def whole(lives: Lives) -> None:
        replies = [Reply(has_readers=number == 0) for number in range(num_requests)]

        async def one(reply: Reply) -> None:
            async with lives.request(ALL, None) as request:
                of_request, end = running(reply), time.monotonic() + seconds
                while time.monotonic() < end:
                    await of_request.take(request, output())
                    await asyncio.sleep(GAP_S)

        await asyncio.gather(*map(one, replies))
        assert max(len(reply.spans) for reply in replies[1:]) <= seconds / live.REST_S
        assert len(replies[0].spans) > 2 * seconds / live.REST_S
        (collector,) = collectors
        assert collector.num_takes <= len(replies[0].spans) + seconds / live.REST_S + 1

    run(whole)


@pytest.mark.parametrize("when", ["the rows are there", "they are being written"])
def test_files_of_requests_that_are_left_go(
    collectors: list[Collector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Nobody has been told of them."""
    monkeypatch.setattr(live, "REST_S", 0.01)

    async def whole(lives: Lives) -> None:
        reply = FileReply(tmp_path, 300.0)
        async with lives.request(PROMPT_ROWS, None) as request:
            of_request = running(reply)
            await of_request.take(request, output())
            while when == "the rows are there" and not list(tmp_path.glob("*.safetensors")):
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.012)
            of_request.leave()
        await asyncio.sleep(0.1)
        assert list(tmp_path.iterdir()) == []
        assert reply.fields == {"vllm_tap": {"files": [], "error": "the request was aborted."}}

    run(whole)
