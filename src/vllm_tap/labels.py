"""Row labels: which request, which position, which token. Plain arrays beside the rows, in both processes.

Worker and client agree on the label that a request carries (`mark`, `read_mark`) and on the order of the label arrays
in a block. A worker numbers the requests it meets; the client turns numbers back into samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

KEY: Final = "vllm_tap"
"""The entry of a request's extra arguments that marks it as captured, and of an engine's configuration with taps."""

NO_TAPS: Final = "this engine has no taps"
"""Reply of a worker without taps to every call."""

LABELS: Final = ("request", "position", "token_id")
"""Order of the int32 label arrays at the head of a block."""

NUM_LABELS: Final = len(LABELS)


class Mark(NamedTuple):
    """Mark that a captured request carries through the engine."""

    capture_id: str
    sample: int
    num_completions: int


def mark(capture_id: str, sample: int, num_completions: int = 1) -> dict[str, Any]:
    """Return the extra arguments that make the engine capture a request."""
    return {KEY: [capture_id, sample, num_completions]}


def read_mark(extra: Mapping[str, Any] | None) -> Mark | None:
    """Return the mark of a request, or None if it is not to be captured.

    Clients of a server may send any extra arguments: what is no mark must not end the engine, and is left alone.
    """
    value = (extra or {}).get(KEY)
    if not isinstance(value, list | tuple) or [type(item) for item in value] != [str, int, int]:
        return None
    return Mark(*value)
