"""The progress bar as vLLM drives it, with a clock of ours. Without an engine."""

from __future__ import annotations

import gc
import re
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tqdm import tqdm

from vllm_tap.client.expected_rows import ExpectedRows, num_rows
from vllm_tap.client.progress import Bar, Progress, is_shown
from vllm_tap.positions import Positions


class Engine:
    """Takes rows when it is told to, and is the clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.rows = 0
        self.stalled = 0.0

    def run(self, seconds: float, rows: int) -> None:
        """Let time pass and rows come."""
        self.now += seconds
        self.rows += rows

    def counts(self) -> Progress:
        """Return rows and bytes, and the time for which the engine stood still."""
        return Progress(self.rows, self.rows * 10**6, self.stalled)


@pytest.fixture
def engine() -> Engine:
    """An engine that has taken nothing."""
    return Engine()


@pytest.fixture
def last_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A function that returns what stands in a terminal of 60 columns."""
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "24")
    return lambda: capsys.readouterr().err.rsplit("\r", 1)[-1].rstrip("\n")


@pytest.fixture(autouse=True)
def no_other_bars() -> Iterator[None]:
    """Close what a test leaves open: bars below each other move the cursor."""
    yield
    for left in list(getattr(tqdm, "_instances", ())):
        left.end = None
        left.close()


def shown(bar: Bar) -> Any:
    """Make a bar as vLLM does."""
    return bar.make(total=2, desc="Processed prompts", dynamic_ncols=True, postfix="est. speed")


def test_the_bar_moves_with_rows(engine: Engine, last_line: Callable[[], str]) -> None:
    """Rows move it while no prompt is finished; the rate and the time left are those of the clock."""
    bar = Bar(engine.counts, lambda: 2000, lambda: engine.now)
    shown(bar)
    seen = []
    for _ in range(4):
        engine.run(seconds=1, rows=400)
        bar.tick()
        seen.append(last_line())
    assert [re.sub(r"\|.*\| ", " ", line).strip() for line in seen] == [
        "20% 400/2.00k rows, 400MB/s, 00:04 left",
        "40% 800/2.00k rows, 400MB/s, 00:03 left",
        "60% 1.20k/2.00k rows, 400MB/s, 00:02 left",
        "80% 1.60k/2.00k rows, 400MB/s, 00:01 left",
    ]
    assert all(len(line) <= 60 and "█" in line for line in seen)
    engine.stalled = 1.25
    bar.tick()
    assert last_line().endswith("00:01 left, stalled 1.2 s")


def test_the_rate_is_that_of_the_last_seconds(engine: Engine, last_line: Callable[[], str]) -> None:
    """Prompts come fast and what they generate slowly: the time left follows."""
    bar = Bar(engine.counts, lambda: 2_000_000, lambda: engine.now)
    shown(bar)
    engine.run(seconds=1, rows=1_000_000)
    bar.tick()
    for _ in range(40):
        engine.run(seconds=0.5, rows=50)
        bar.tick()
    assert "100MB/s, 2:46:20 left" in (line := last_line())
    assert len(line) <= 60


def test_finished_prompts_do_not_move_it(engine: Engine, last_line: Callable[[], str]) -> None:
    """vLLM's updates and token rates change nothing; the last line has all rows and the whole time."""
    bar = Bar(engine.counts, lambda: 1234, lambda: engine.now)
    made = shown(bar)
    made.postfix = "est. speed"
    made.update(1)
    assert last_line().endswith("| 0/1.23k rows")
    engine.run(seconds=2, rows=1200)  # one ended before it had all its tokens
    made.close()
    assert (line := last_line()).endswith("| 1.20k rows, 600MB/s, 00:02")
    assert line.startswith("100%|")


def test_an_interrupted_bar_stays_where_it_is(engine: Engine, last_line: Callable[[], str]) -> None:
    """It asks no worker for its last line: the engine may be gone. What is printed next stands below."""
    asked = []
    bar = Bar(lambda: (asked.append(1), engine.counts())[1], lambda: 1000, lambda: engine.now)
    shown(bar)
    engine.run(seconds=1, rows=500)
    bar.tick()
    bar.close()
    bar.close()
    assert len(asked) == 1
    assert " 50%|" in last_line()


def test_requests_are_queued_without_a_bar() -> None:
    """vLLM asks for a bar with the requests that it is about to render."""
    requests = ["a", "b"]
    bar = Bar(lambda: (0, 0), lambda: 0)
    assert bar.make(requests, desc="Rendering prompts") is requests
    bar.tick()
    bar.close()
    assert [is_shown(True), is_shown(False)] == [True, False]


def test_a_bar_keeps_nothing_when_it_is_done() -> None:
    """Threads that watch bars would keep the capture, and with it all memory that it maps."""
    engine = Engine()
    gone = weakref.ref(engine)
    bar = Bar(engine.counts, lambda: 1)
    made = shown(bar)
    made.close()
    bar.close()
    del made, bar, engine
    gc.collect()
    assert gone() is None


def request(num_prompt: int, generated: list[int], most: int | None) -> Any:
    """Return a request's state as vLLM's output processor keeps it."""
    detokenizer = None if most is None else SimpleNamespace(output_token_ids=generated)
    return SimpleNamespace(prompt_len=num_prompt, detokenizer=detokenizer, max_tokens_param=most)


def test_expected_rows_shrink_when_a_request_ends_early() -> None:
    """A request counts with all its tokens until it has ended; one that is not queued yet counts like the others."""
    states = {"0": request(10, [1], 5), "1": request(20, [], 5)}
    llm = SimpleNamespace(llm_engine=SimpleNamespace(output_processor=SimpleNamespace(request_states=states)))
    expected = ExpectedRows(llm, "all", 4)
    assert expected() == 2 * (14 + 24)
    del states["0"]
    states.update({"2": request(3, [], 1), "3": request(7, [], None)})
    assert expected() == 10 + 24 + 3 + 7
    states.clear()
    assert expected() == 10 + 20 + 3 + 7


@pytest.mark.parametrize(
    ("positions", "count"),
    [
        ("all", 8),
        ("prompt", 5),
        ("generated", 3),
        ("last", 1),
        ((0, -1), 2),
        ((0, -5, 9), 1),
        (Positions.prompt(-2) | Positions.generated(-1), 5),
    ],
)
def test_rows_of_a_sequence(positions: Any, count: int) -> None:
    """5 tokens of a prompt and 4 generated ones, of which the last has no row."""
    assert num_rows(positions, 5, 4) == count
