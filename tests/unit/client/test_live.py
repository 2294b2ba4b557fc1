"""Requests that share a capture in an event loop: when they ask the workers for rows, when it begins and ends.

No engine runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.client import live
from vllm_tap.client.live import Request
from vllm_tap.client.lives import Lives
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


def test_rows_that_nobody_waits_for_are_crowded_when_they_are_many() -> None:
    """Of two requests, each may have a sixteenth of the budget in the workers: 5 rows."""
    request, tokens = Request(Live(Spec(hidden_states=[0], positions="all")), None), Tokens(is_delta=True)  # type: ignore[arg-type]
    crowded = []
    for number in range(4):
        one = SimpleNamespace(index=0, token_ids=[number])
        tokens.add(SimpleNamespace(request_id="", finished=False, prompt_token_ids=PROMPT, outputs=[one]))
        crowded.append(request.is_crowded(tokens))
    assert crowded == [False, False, True, True]
    asyncio.run(request.rows(tokens))
    assert not request.is_crowded(tokens)


@pytest.mark.parametrize(
    ("spec", "has_more"),
    [
        (Spec(hidden_states=[0], positions="all"), [False, True, True]),
        (Spec(hidden_states=[0], positions="last"), [False, True, False]),
        (Spec(hidden_states=[0], positions="all", reduce="mean"), [False, False, False]),
        (Spec(hidden_states=[0], positions="last_generated"), [False, False, False]),
    ],
)
def test_a_request_may_have_more_rows_from_its_first_token_on(spec: Spec, has_more: list[bool]) -> None:
    """Those of a prompt once; what is known at the end, then."""
    request, tokens = Request(Live(spec), None), Tokens(is_delta=True)  # type: ignore[arg-type]
    found = [request.has_more(tokens)]
    one = SimpleNamespace(index=0, token_ids=[1])
    tokens.add(SimpleNamespace(request_id="", finished=False, prompt_token_ids=PROMPT, outputs=[one]))
    found.append(request.has_more(tokens))
    asyncio.run(request.rows(tokens))
    found.append(request.has_more(tokens))
    assert found == has_more


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


def test_requests_that_rest_share_a_call_and_one_that_is_wanted_waits_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rest of the others goes on. Whoever is wanted before it rests does not."""
    Recordings(monkeypatch)
    told: list[int] = []
    taken: list[int] = []
    collector = SimpleNamespace(take=lambda: taken.append(len(told)), drop=lambda sample: None, close=lambda: None)
    monkeypatch.setattr(live, "Collector", lambda recording: collector)
    monkeypatch.setattr(live, "REST_S", 0.05)

    async def run(lives: Lives) -> None:
        async with contextlib.AsyncExitStack() as stack:
            requests = [await stack.enter_async_context(lives.request(SPECS[0], None)) for _ in range(5)]

            async def ask(number: int) -> None:
                await requests[number].rest()
                await requests[number]._live.ask(lambda collector: told.append(number))

            requests[0].hurry()
            asking = [asyncio.create_task(ask(number)) for number in range(5)]
            await asking[0]
            requests[1].hurry()
            await asking[1]
            assert taken == [0, 1]
            await asyncio.gather(*asking)
            assert taken == [0, 1, 2]
            assert sorted(told) == [0, 1, 2, 3, 4]

    run_lives(run)


def test_a_start_that_fails_when_nobody_waits_is_not_the_next_request_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose own start may go well."""
    recordings = Recordings(monkeypatch)
    begin = recordings.begin

    def fail(connection: Any, spec: Spec, **options: Any) -> Any:
        time.sleep(0.05)
        raise CaptureError("it broke")

    async def run(lives: Lives) -> None:
        async def use() -> None:
            async with lives.request(SPECS[0], None):
                pass

        monkeypatch.setattr(live, "Recording", fail)
        first = asyncio.create_task(use())
        await asyncio.sleep(0.01)
        first.cancel()
        await asyncio.wait([first])
        await asyncio.sleep(0.1)
        monkeypatch.setattr(live, "Recording", begin)
        await use()

    run_lives(run, linger_s=60.0)


def test_no_more_captures_wait_for_requests_than_there_are_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that the engine's API processes share: what this one uses beyond ends at once."""
    recordings = Recordings(monkeypatch)

    async def run(lives: Lives) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for spec in SPECS:
                await stack.enter_async_context(lives.request(spec, None))
            assert recordings.under_way == SPECS
        await lives.idle()
        assert len(recordings.under_way) == 2

    run_lives(run, linger_s=60.0, most=2)
