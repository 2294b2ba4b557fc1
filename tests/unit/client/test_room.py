"""Room that requests of an event loop wait for, and the terms of captures whose rows do not fit. Without an engine."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_tap.client.bounds import AS_THEY_COME, AT_THE_END, Spill, at_the_end, read_budget, read_on_full, room_of
from vllm_tap.client.room import PART_OF_BUDGET, Room
from vllm_tap.errors import SpecError
from vllm_tap.vllm.asynchronous import most_rows


def test_requests_wait_until_others_have_left() -> None:
    """Together they never take more than their part; one that is larger alone runs alone."""

    async def run() -> None:
        room, running, most = Room(PART_OF_BUDGET * 100), 0, 0

        async def request(nbytes: int) -> None:
            nonlocal running, most
            await room.enter(nbytes)
            running += nbytes
            most = max(most, running)
            assert running <= 100 or running == nbytes
            await asyncio.sleep(0)
            running -= nbytes
            room.leave(nbytes)

        await asyncio.wait_for(asyncio.gather(*(request(n) for n in [40, 70, 30, 500, 10, 60, 100, 1] * 8)), 20)
        assert running == 0
        assert most == 500

    asyncio.run(run())


def test_who_is_cancelled_while_it_waits_takes_nothing() -> None:
    """Those behind it go on."""

    async def run() -> None:
        room = Room(PART_OF_BUDGET * 100)
        assert room.has(500)
        await room.enter(100)
        assert not room.has(1)
        waiting = [asyncio.create_task(room.enter(50)) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        room.leave(100)
        await asyncio.wait_for(waiting[1], 20)
        assert room.has(50)
        await asyncio.wait_for(room.enter(50), 20)

    asyncio.run(run())


def test_a_room_without_a_bound_lets_everyone_in() -> None:
    """As where rows beyond the budget are to be an error."""

    async def run() -> None:
        room = Room(None)
        for _ in range(3):
            await asyncio.wait_for(room.enter(1 << 60), 20)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("prompt", "fields", "expected"),
    [
        ({"prompt_token_ids": [1, 2, 3]}, {"max_tokens": 4}, 7),
        ({"prompt_token_ids": [1, 2, 3]}, {"max_tokens": 4, "n": 3}, 21),
        ({"prompt_token_ids": [1, 2, 3]}, {"max_tokens": None}, 100),
        ("äb", {"max_tokens": 4}, 3 + 16 + 4),
        ({"prompt": "ab"}, {"max_tokens": 4}, 2 + 16 + 4),
        ({"prompt_embeds": [[0.5]]}, {"max_tokens": 4}, 100),
    ],
    ids=str,
)
def test_a_request_makes_no_more_rows_than_this(prompt: Any, fields: dict[str, Any], expected: int) -> None:
    """Its tokens, as far as they are known, and what it may generate; never more than the model takes."""
    llm = SimpleNamespace(vllm_config=SimpleNamespace(model_config=SimpleNamespace(max_model_len=100)))
    assert most_rows(llm, prompt, SimpleNamespace(**{"n": 1, **fields})) == expected


def test_the_terms_of_files(tmp_path: Path) -> None:
    """A folder and a bound, shared out among ranks; the default is the folder for temporary files, and half of it."""
    assert Spill(tmp_path, 100).terms(3) == type(Spill(tmp_path, 100).terms(1))(str(tmp_path), 33)
    assert Spill().terms(1).folder == tempfile.gettempdir()
    assert Spill().terms(1).most_bytes > 0
    assert room_of(7, Spill(tmp_path, 100)) == 107
    assert room_of(7, "wait") == 7
    assert isinstance(read_on_full("spill", AT_THE_END), Spill)
    assert at_the_end("wait") == "fail"


@pytest.mark.parametrize(
    ("given", "known", "match"),
    [
        ("wait", AT_THE_END, r"Tap\(llm\).stream"),
        ("spil", AS_THEY_COME, "Did you mean 'spill'"),
        (None, AS_THEY_COME, "Known:"),
    ],
)
def test_other_words_are_refused(given: Any, known: Any, match: str) -> None:
    """With those that are known."""
    with pytest.raises(SpecError, match=match):
        read_on_full(given, known)


@pytest.mark.parametrize(
    ("fields", "match"), [({"folder": "/none/here"}, "no folder"), ({"most_bytes": 0}, "positive")]
)
def test_files_that_cannot_be_are_refused(fields: dict[str, Any], match: str) -> None:
    """Before a worker hears of them."""
    with pytest.raises(SpecError, match=match):
        Spill(**fields).terms(1)


@pytest.mark.parametrize("given", [0, -1, 1.5, float("inf"), float("nan"), "1 GiB", [], b""])
def test_a_budget_that_cannot_be_is_refused(given: Any) -> None:
    """Of captures and of streams."""
    with pytest.raises(SpecError, match="budget_bytes is a positive whole number"):
        read_budget(given)


def test_a_budget_may_be_any_whole_number() -> None:
    """As `2 * 2**30` and `1e9` are; none is a part of the machine's memory."""
    assert [read_budget(given) for given in (1, 1e9)] == [1, 10**9]
    assert 0 < read_budget(None) <= 8 << 30
