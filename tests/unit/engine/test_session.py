"""Requests that a capture meets, with marks from outside. Without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vllm_tap.engine.capture.session import Session
from vllm_tap.errors import SpecError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream
from vllm_tap.labels import Mark
from vllm_tap.positions import Positions
from vllm_tap.spec import plain_positions
from vllm_tap.vllm.runner import Batch


class Sink:
    """Takes selections down."""

    def __init__(self) -> None:
        self.selected: list[list[int]] = []

    def before_forward(self, chunk: Any, start: int, form: Any, selection: Any, batch: Batch) -> None:
        """Take down the tokens of a step."""
        self.selected.append(selection.sources.tolist())

    def repeat(self, start: int) -> bool:
        """Every step is begun as any other."""
        return False

    def clear(self) -> None:
        """No rows."""

    def after_forward(self) -> list[Any]:
        """No tap was silent."""
        return []


def session_of(positions: Any) -> tuple[Session, Sink]:
    """Return a capture of a stream, and where its rows go."""
    start = messages.Start(
        capture_id="x",
        streams={"hidden_states": (0,)},
        positions=positions,
        residual="",
        shared=False,
        clients={},
        budget_bytes=1 << 20,
        staging="auto",
        expected_rows=0,
    )
    chunk = SimpleNamespace(offset=0, nbytes=1 << 16, segment_id=1, block_id=1)
    account: Any = SimpleNamespace(reserve=lambda nbytes: chunk, pool=SimpleNamespace(grow_more=lambda: None))
    sink = Sink()
    return Session(start, 0, [Stream("hidden_states", "float32", 4, (0,))], sink, account), sink  # type: ignore[arg-type]


def batch(*requests: tuple[str, int, int]) -> Batch:
    """Return a step of (request, tokens, tokens before)."""
    starts = np.cumsum([0, *(count for _, count, _ in requests)]).astype(np.int32)
    computed = np.array([before for *_, before in requests], np.int32)
    return Batch([name for name, *_ in requests], starts, computed, torch.empty(0), torch.empty(0))


def test_each_request_has_the_positions_of_its_mark() -> None:
    """Those of the capture where it names none; numbers of requests follow the order in which they were met."""
    session, sink = session_of("last")
    window = plain_positions(Positions.prompt(1, 3) | Positions.generated(step=2))
    session.meet("a", Mark("x", 0, 1), 4)
    session.meet("b", Mark("x", 1, 1, window), 4)
    session.meet("c", Mark("y", 2, 1, "all"), 4)
    session.meet("d", Mark("x", 3, 1, [0]), 4)
    session.before_forward(batch(("a", 4, 0), ("b", 4, 0), ("c", 4, 0), ("d", 4, 0)))
    session.after_forward()
    session.before_forward(batch(("a", 1, 4), ("b", 1, 4), ("d", 1, 4)))
    assert sink.selected == [[3, 5, 6, 12], [1]]
    assert session.error is None


@pytest.mark.parametrize("positions", ["nobody", [0.5], {"or": [1, 2]}, {"prompt": "x"}, [], {}])
def test_a_mark_that_says_nonsense_ends_its_capture_and_not_the_engine(positions: Any) -> None:
    """The client gets the sentence when it asks for the rows."""
    session, sink = session_of("all")
    session.meet("a", Mark("x", 0, 1, positions), 4)
    session.before_forward(batch(("a", 4, 0)))
    assert not sink.selected
    with pytest.raises(SpecError):
        session.finish()
