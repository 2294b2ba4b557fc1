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
    """Mark that a captured request carries through the engine.

    Attributes:
        capture_id: Name of its capture.
        sample: Number by which the client knows it.
        num_completions: Requests that it becomes.
        positions: Which of its rows are taken, in the plain form of `spec.plain_positions`; those of its capture if
            None.
        reads_cache: (from_start, from_end), see `positions.Begin`: although it says to skip the prefix cache, it may
            read it up to there. None for a request that is to be taken by its word.
    """

    capture_id: str
    sample: int
    num_completions: int
    positions: Any = None
    reads_cache: tuple[int, int] | None = None


def mark(
    capture_id: str,
    sample: int,
    num_completions: int = 1,
    positions: Any = None,
    reads_cache: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return the extra arguments that make the engine capture a request; see `Mark`."""
    fields: list[Any] = [capture_id, sample, num_completions, positions, reads_cache]
    while fields[-1] is None:
        fields.pop()
    return {KEY: fields}


def read_mark(extra: Mapping[str, Any] | None) -> Mark | None:
    """Return the mark of a request, or None if it is not to be captured.

    Clients of a server may send any extra arguments: what is no mark must not end the engine, and is left alone.
    """
    value = (extra or {}).get(KEY)
    if not isinstance(value, list | tuple) or [type(item) for item in value[:3]] != [str, int, int] or len(value) > 5:
        return None
    positions, reads_cache = [*value[3:], None, None][:2]
    if not isinstance(positions, str | list | tuple | dict | None):
        return None
    if reads_cache is not None:
        if not isinstance(reads_cache, list | tuple) or [type(number) for number in reads_cache] != [int, int]:
            return None
        reads_cache = (reads_cache[0], reads_cache[1])
    return Mark(value[0], value[1], value[2], positions, reads_cache)
