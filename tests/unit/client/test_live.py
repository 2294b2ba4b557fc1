"""Requests that share a capture in an event loop: when they ask the workers for rows, when it begins and ends.

No engine runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.client import live
from vllm_tap.client.live import Lives, Request
from vllm_tap.errors import CaptureError
from vllm_tap.spec import Spec
from vllm_tap.vllm.asynchronous import Tokens

PROMPT = [1, 2, 3]
NUM_TOKENS = 5


class Live:
    """A capture of no engine, that keeps which positions were asked for."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.recording = SimpleNamespace(mark=lambda params, sample: params)
        self.asked: list[tuple[int, int]] = []
        self.num_taken = 0
        self.row_bytes, self.num_users, self.budget_bytes = 100, 2, 8000

    def new_sample(self) -> int:
        return 0

    async def ask(self, function: Callable[[Any], Any], *, takes: bool) -> Any:
        self.num_taken += takes
        return function(self)

    def rows_until(self, sample: int, tokens: Tokens, begin: int, end: int) -> Any:
        self.asked.append((begin, end))
        return SimpleNamespace(num_rows=end - begin)


@pytest.mark.parametrize(
    ("spec", "asked", "num_taken"),
    [
        (Spec(hidden_states=[0], positions="all"), [(0, 3), (3, 4), (4, 5), (5, 6), (6, 7)], 5),
        (Spec(hidden_states=[0], positions="last"), [(0, 3), (3, 7)], 1),
        (Spec(hidden_states=[0], positions="prompt"), [(0, 3), (3, 7)], 1),
        (Spec(hidden_states=[0], positions=[0, -1]), [(0, 3), (3, 7)], 1),
        (Spec(hidden_states=[0], positions="all", reduce="mean"), [(0, 7)], 1),
    ],
)
def test_rows_of_prompts_are_not_asked_for_with_every_token(
    spec: Spec, asked: list[tuple[int, int]], num_taken: int
) -> None:
    """Once when they are final; those of generated tokens as they come. At the end nothing is left in the workers."""
    live, tokens = Live(spec), Tokens(is_delta=True)

    async def run() -> None:
        request = Request(live, None)  # type: ignore[arg-type]
        for number in range(NUM_TOKENS):
            one = SimpleNamespace(index=0, token_ids=[number])
            finished = number == NUM_TOKENS - 1
            tokens.add(SimpleNamespace(request_id="", finished=finished, prompt_token_ids=PROMPT, outputs=[one]))
            await request.rows(tokens)

    asyncio.run(run())
    assert live.asked == asked
    assert live.num_taken == num_taken


def test_rows_that_nobody_waits_for_are_due_after_a_while_or_when_they_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two requests, each may have a sixteenth of the budget in the workers: 5 rows."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(live, "time", SimpleNamespace(monotonic=lambda: clock.now))

    async def run() -> None:
        request, tokens = Request(Live(Spec(hidden_states=[0], positions="all")), None), Tokens(True)  # type: ignore[arg-type]

        def come(*ids: int, finished: bool = False) -> bool:
            one = SimpleNamespace(index=0, token_ids=list(ids))
            tokens.add(SimpleNamespace(request_id="", finished=finished, prompt_token_ids=PROMPT, outputs=[one]))
            return request.is_due(tokens)

        assert not come(1, 2)
        assert come(3)
        await request.rows(tokens)
        assert not come(4)
        clock.now += 2 * live.REST_S
        assert come(5)
        await request.rows(tokens)
        assert not come(6)
        assert come(7, finished=True)

    asyncio.run(run())


class Recordings:
    """Stands in for `Recording` and `Collector`: captures of no engine, which has a number of places for them.

    Attributes:
        begun: Specs by the order in which their captures began.
        under_way: Those that are.
        waits_left: Tries that find no place, though there is one here: another process holds it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, places: int = 8) -> None:
        self.places, self.waits_left = places, 0
        self.begun: list[Spec] = []
        self.under_way: list[Spec] = []
        monkeypatch.setattr(live, "Recording", self.begin)
        monkeypatch.setattr(live, "Collector", lambda recording: SimpleNamespace(close=lambda: None))
        monkeypatch.setattr(live.Collector, "close", lambda collector: None, raising=False)
        monkeypatch.setattr(live, "POLL_S", 0.001)

    def begin(self, connection: Any, spec: Spec, **options: Any) -> Any:
        """Begin a capture.

        Raises:
            CaptureError: There is no place for it.
        """
        self.waits_left -= 1
        if self.waits_left >= 0 or len(self.under_way) >= self.places:
            raise CaptureError("full", places=self.places)
        self.begun.append(spec)
        self.under_way.append(spec)
        return SimpleNamespace(
            mark=lambda params, sample: params, row_bytes=1, forget_marked=lambda sample: None,
            stop=lambda: self.under_way.remove(spec),
        )  # fmt: skip


SPECS = [Spec(hidden_states=[layer]) for layer in range(4)]


def run_lives(run: Callable[[Lives], Coroutine[Any, Any, None]], **options: Any) -> None:
    """Run a function of captures of a connection to nobody."""

    async def whole() -> None:
        await run(Lives(SimpleNamespace(may_change=False), **options))  # type: ignore[arg-type]

    asyncio.run(whole())


@pytest.mark.parametrize(("linger_s", "num_begun"), [(0.2, 1), (0.0, 2)])
def test_a_capture_stays_for_a_while_after_its_last_request(
    monkeypatch: pytest.MonkeyPatch, linger_s: float, num_begun: int
) -> None:
    """It ends when none comes; without `linger_s` at once. Nobody uses it meanwhile."""
    recordings = Recordings(monkeypatch)

    async def run(lives: Lives) -> None:
        for _ in range(2):
            async with lives.request(SPECS[0], None):
                assert SPECS[0] in lives
                assert len(lives) == 1
            assert SPECS[0] not in lives
            assert len(lives) == 0
            await lives.idle()
        assert len(recordings.begun) == num_begun
        await asyncio.sleep(linger_s + 0.1)
        await lives.idle()
        assert not recordings.under_way

    run_lives(run, linger_s=linger_s)


def test_captures_that_wait_for_requests_make_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that has waited longest ends before another begins, and none that is used."""
    recordings = Recordings(monkeypatch, places=3)

    async def run(lives: Lives) -> None:
        async with lives.request(SPECS[0], None):
            for spec in (SPECS[1], SPECS[2], SPECS[1]):
                async with lives.request(spec, None):
                    pass
            assert recordings.begun == SPECS[:3]
            async with lives.request(SPECS[3], None):
                assert recordings.under_way == [SPECS[0], SPECS[1], SPECS[3]]
                assert len(lives) == 2

    run_lives(run, linger_s=60.0, most=3)


def test_a_capture_waits_for_a_place_that_another_process_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """For as long as captures stay without requests; then it is refused, and the next request tries again."""
    recordings = Recordings(monkeypatch)

    async def run(lives: Lives) -> None:
        recordings.waits_left = 3
        async with lives.request(SPECS[0], None):
            assert recordings.under_way == [SPECS[0]]
        recordings.waits_left = 10**6
        for _ in range(2):
            with pytest.raises(CaptureError, match="full"):
                async with lives.request(SPECS[1], None):
                    pass
        recordings.waits_left = 0
        async with lives.request(SPECS[1], None):
            assert SPECS[1] in lives

    run_lives(run, linger_s=0.2)


def test_a_capture_that_failed_while_none_used_it_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends, and another begins."""
    recordings = Recordings(monkeypatch)

    async def run(lives: Lives) -> None:
        async with lives.request(SPECS[0], None) as request:
            failed = request._live
        failed.error = CaptureError("it broke")
        async with lives.request(SPECS[0], None) as request:
            assert request._live is not failed
        await lives.idle()
        assert recordings.under_way == [SPECS[0]]

    run_lives(run, linger_s=60.0)
