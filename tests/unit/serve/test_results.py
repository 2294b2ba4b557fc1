"""Results that wait to be read: limits, names, time, readers. No server runs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from vllm_tap.errors import BudgetError, SpecError
from vllm_tap.frame import body
from vllm_tap.serve import settings
from vllm_tap.serve.reply import ranges
from vllm_tap.serve.results import Results
from vllm_tap.serve.settings import KEY, Settings


class Clock:
    """A time that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run(test: Any, clock: Clock | None = None, **limits: Any) -> None:
    """Run a test of results with these limits in an event loop."""

    async def inside() -> None:
        await test(Results(Settings(**limits), clock or Clock()))

    asyncio.run(inside())


def test_a_reader_gets_frames_as_they_come_and_others_all_of_them() -> None:
    """Whoever reads before the end waits for it."""

    async def test(results: Results) -> None:
        result = results.open("key", ["name"])
        found: list[bytes] = []

        async def read() -> None:
            found.extend([frame async for frame in result.read()])

        reading = asyncio.create_task(read())
        for number in range(5):
            results.add(result, bytes([number]))
            await asyncio.sleep(0)
        assert not reading.done()
        results.end(result)
        await reading
        assert found == [*(bytes([number]) for number in range(5)), body.encode("end")]
        assert [frame async for frame in result.read()] == found

    run(test)


@pytest.mark.parametrize("num_read", range(5))
def test_a_reader_of_rows_that_fall_away_is_told(num_read: int) -> None:
    """However many it has read."""

    async def test(results: Results) -> None:
        result = results.open("key", ["name"])
        for number in range(4):
            results.add(result, bytes([number]))
        reader = result.read()
        for _ in range(num_read):
            await anext(reader)
        results.end(result, "it broke")
        assert body.frames([frame async for frame in reader][-1])[0].head["message"] == "it broke"

    run(test)


def test_names_are_those_of_a_key() -> None:
    """Another key finds nothing by them, and may use the same; within a key they are its own."""

    async def test(results: Results) -> None:
        mine, other = results.open("mine", ["name"]), results.open("other", ["name"])
        assert results.find("mine", "name") is mine
        assert results.find("mine", mine.id) is mine
        assert results.find("other", mine.id) is None
        with pytest.raises(ValueError, match="choose another"):
            results.open("mine", ["name"])
        assert not results.delete("other", mine.id)
        assert results.delete("mine", "name")
        assert results.find("mine", mine.id) is None
        assert results.find("other", "name") is other

    run(test)


def test_bytes_and_results_have_limits_and_are_free_again() -> None:
    """Those of a key, and those of all."""

    async def test(results: Results) -> None:
        first = results.open("a", ["1"])
        results.open("a", ["2"])
        with pytest.raises(BudgetError, match="keeps 2 results"):
            results.open("a", ["3"])
        second = results.open("b", ["1"])
        results.add(first, bytes(60))
        with pytest.raises(BudgetError, match="keeps 70 bytes"):
            results.add(first, bytes(11))
        with pytest.raises(BudgetError, match="bytes of rows"):
            results.add(second, bytes(41))
        results.end(first, "full")
        assert results.num_bytes == 0
        assert body.frames([frame async for frame in first.read()][-1])[0].head["message"] == "full"
        results.add(second, bytes(41))
        results.delete("b", "1")
        results.delete("a", "1")
        assert (results.num_bytes, len(results)) == (0, 1)

    run(test, max_results=3, max_results_per_key=2, max_bytes=100, max_bytes_per_key=70)


def test_a_result_is_kept_for_its_time_after_its_end() -> None:
    """Not while it goes on; a reader that has begun reads on."""
    clock = Clock()

    async def test(results: Results) -> None:
        result = results.open("key", ["name"])
        results.add(result, b"x" * 8)
        clock.now = 100
        assert results.find("key", "name") is result
        reader = result.read()
        assert await anext(reader) == b"x" * 8
        results.end(result)
        clock.now = 109
        assert results.find("key", "name") is result
        clock.now = 110
        assert results.find("key", "name") is None
        assert (results.num_bytes, len(results)) == (0, 0)
        assert await anext(reader) == body.encode("end")

    run(test, clock, ttl_s=10)


def test_ten_thousand_results_leave_nothing_behind() -> None:
    """Neither names nor counts."""

    async def test(results: Results) -> None:
        for number in range(10_000):
            results.add(results.open(f"key {number % 7}", [f"name {number}"]), bytes(3))
        assert results.num_bytes == 30_000
        for number in range(10_000):
            assert results.delete(f"key {number % 7}", f"name {number}")
        state = {name: value for name, value in vars(results).items() if name not in ("_settings", "_now")}
        assert not any(state.values()), state

    run(test, max_results=10_000)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_byte": 3}, "max_byte"),
        ({"max_bytes": "3"}, "max_bytes"),
        ({"captures": "no"}, '"allow" or "forbid"'),
        ({"spec": {"hidden": 3}}, "no field 'hidden'"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], says: str) -> None:
    """By name."""
    with pytest.raises(SpecError, match=says):
        settings.read({KEY: given})


def test_settings_are_optional() -> None:
    """Without them, the defaults hold."""
    assert settings.read(None) == settings.read({}) == Settings()
    assert settings.read({KEY: {"spec": {"hidden_states": [1]}}}).default_spec is not None


def test_positions_are_told_as_ranges() -> None:
    """Half-open ones."""
    assert ranges([]) == []
    assert ranges([0, 1, 2, 5, 7, 8]) == [[0, 3], [5, 6], [7, 9]]


def test_who_reads_a_result_that_is_deleted_gets_the_rest() -> None:
    """And whoever comes later nothing; what nobody reads is not kept."""

    async def run() -> None:
        results = Results(Settings())
        result = results.open("", ["a"])
        results.add(result, b"0")
        found: list[bytes] = []

        async def read() -> None:
            found.extend([bytes(piece) async for piece in result.read()])

        reading = asyncio.create_task(read())
        await asyncio.sleep(0)
        assert results.delete("", "a")
        results.add(result, b"1")
        results.end(result)
        await asyncio.wait_for(reading, 20)
        assert found == [b"0", b"1", body.encode("end")]
        assert results.num_bytes == 0
        alone = results.open("", ["b"])
        results.delete("", "b")
        results.add(alone, b"0")
        assert alone.frames == []

    asyncio.run(run())
