"""Room for the frames of Python calls. Worker process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeVar

FRAME_WORDS: Final = 8200
"""More than 64 KiB: CPython rounds up to a chunk of 128, and leaves more than 60 to what is called from there."""

F = TypeVar("F", bound=Callable[..., Any])


def with_room(function: F) -> F:
    """Change a function so that what it calls has room for its frames, and return it.

    CPython lays frames in chunks of 16 KiB. A call for which there is no room takes a new one from the system, and
    gives it back when it returns (3.11, 3.12, and early releases of 3.13 and 3.14: issue 142183 of python/cpython).
    Where that happens in a loop, it does each time round; a wrapper's frame further out moves it there, or away. The
    frame of such a function always begins a chunk, one that is large enough.

    Cost: a chunk for each call, some ten microseconds with the page faults where it is used.
    """
    function.__code__ = function.__code__.replace(co_stacksize=FRAME_WORDS)
    return function
