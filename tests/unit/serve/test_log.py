"""Messages of API processes, in which another package silences loggers that have no level of their own."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator

import pytest

from vllm_tap.vllm.log import log_as_vllm


@pytest.fixture
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger]]:
    """Ours and vLLM's, as they are in a process where neither has been configured, and the root takes errors alone."""
    ours, theirs = both = logging.getLogger("vllm_tap"), logging.getLogger("vllm")
    before = [(one, one.handlers, one.level, one.propagate) for one in (*both, logging.root)]
    for one in both:
        one.handlers, one.level, one.propagate = [], logging.NOTSET, True
    logging.root.setLevel(logging.ERROR)
    logging.root.manager._clear_cache()  # type: ignore[attr-defined]
    yield ours, theirs
    for one, handlers, level, propagate in before:
        one.handlers, one.propagate = handlers, propagate
        one.setLevel(level)


@pytest.mark.parametrize(
    ("level", "told"), [(logging.WARNING, "warned\n"), (logging.INFO, "warned\n"), (logging.ERROR, "")]
)
def test_messages_go_where_those_of_vllm_go(
    loggers: tuple[logging.Logger, logging.Logger], level: int, told: str
) -> None:
    """From its level on, and once."""
    ours, theirs = loggers
    ours.warning("nobody hears this")
    text = io.StringIO()
    theirs.addHandler(logging.StreamHandler(text))
    theirs.setLevel(level)
    for _ in range(2):
        log_as_vllm()
    ours.warning("warned")
    assert text.getvalue() == told


def test_nothing_changes_where_somebody_has_configured_the_log(loggers: tuple[logging.Logger, logging.Logger]) -> None:
    """For our messages, or none for vLLM's."""
    ours, theirs = loggers
    log_as_vllm()
    assert (ours.handlers, ours.propagate, ours.level) == ([], True, logging.NOTSET)
    own = logging.StreamHandler(io.StringIO())
    ours.addHandler(own)
    theirs.addHandler(logging.StreamHandler(io.StringIO()))
    log_as_vllm()
    assert (ours.handlers, ours.propagate) == ([own], True)
