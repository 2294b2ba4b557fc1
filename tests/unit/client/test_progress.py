"""The progress bar as vLLM drives it. Without an engine."""

from __future__ import annotations

import gc
import weakref

import pytest

from vllm_tap.client.progress import bar


class Taken:
    """Says what the workers have taken."""

    def counts(self) -> tuple[int, int]:
        """Return rows and bytes."""
        return 1234, 10**9


def test_requests_are_queued_without_a_bar_and_run_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM asks for both, the first with the requests; the last line says how many rows there are."""
    make = bar(True, Taken().counts)
    requests = ["a", "b"]
    assert make(requests, desc="Rendering prompts") is requests
    shown = make(total=2, desc="Processed prompts", dynamic_ncols=True, postfix="est. speed")
    for _ in requests:
        shown.postfix = "est. speed"
        shown.update(1)
    shown.close()
    assert "Capturing: 100%" in (last := capsys.readouterr().err.rsplit("\r", 1)[-1])
    assert "2/2" in last
    assert "1,234 rows" in last


def test_a_bar_keeps_nothing_when_it_is_done() -> None:
    """Threads that watch bars would keep the capture, and with it all memory that it maps."""
    taken = Taken()
    gone = weakref.ref(taken)
    shown = bar(True, taken.counts)(total=1)
    shown.update(1)
    shown.close()
    del shown, taken
    gc.collect()
    assert gone() is None
