"""The memory of a capture, and terms for rows that do not fit it. Client process."""

from __future__ import annotations

import numbers
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from vllm_tap.errors import SpecError
from vllm_tap.frame import messages
from vllm_tap.spec import nearest

MAX_DEFAULT_BUDGET_BYTES: Final = 8 << 30

AT_THE_END: Final = ("fail", "spill")
AS_THEY_COME: Final = ("wait", "spill", "fail")
"""Ways with rows beyond the budget, of captures that hand over at the end and of streams."""


@dataclass(frozen=True)
class Spill:
    """`on_full`: rows beyond the budget go to files, which are read as the rest is.

    The files have no name and are gone with the result, or with the processes that hold them.

    Args:
        folder: Folder of the workers' host, on a disk; by default that for temporary files. In a folder that lies in
            memory, such as /dev/shm and on some systems /tmp, nothing is gained.
        most_bytes: The most that the files may take, over all workers; by default half of what is free there.
    """

    folder: str | os.PathLike[str] | None = None
    most_bytes: int | None = None

    def terms(self, num_ranks: int) -> messages.Spill:
        """Return what each of some workers is told.

        Raises:
            SpecError: The folder is none, or the number.
        """
        folder, most = self._checked()
        return messages.Spill(folder, most // num_ranks)

    @property
    def room(self) -> int:
        """The most bytes that the files may take."""
        return self._checked()[1]

    def _checked(self) -> tuple[str, int]:
        folder = os.path.abspath(tempfile.gettempdir() if self.folder is None else os.fspath(self.folder))
        if not os.path.isdir(folder):
            raise SpecError(f"Spill(folder={folder!r}) is no folder: make it, or pass another.", path=folder)
        most = shutil.disk_usage(folder).free // 2 if self.most_bytes is None else self.most_bytes
        if not isinstance(most, int) or most < 1:
            raise SpecError(f"Spill.most_bytes is a positive whole number, got {most!r}.")
        return folder, most


def default_budget_bytes() -> int:
    """Return a quarter of this machine's RAM, at most 8 GiB."""
    return min(MAX_DEFAULT_BUDGET_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4)


def read_budget(given: Any) -> int:
    """Return the most bytes of memory for rows that were asked for, by default `default_budget_bytes()`.

    Raises:
        SpecError: It is no positive whole number.
    """
    return default_budget_bytes() if given is None else whole_number("budget_bytes", given)


def whole_number(name: str, given: Any) -> int:
    """Return a number of bytes that was given by this name.

    Raises:
        SpecError: It is no positive whole number.
    """
    is_number: bool = isinstance(given, numbers.Real)
    if not (is_number and given >= 1 and given % 1 == 0):
        raise SpecError(f"{name} is a positive whole number, got {given!r}.")
    return int(given)


def read_on_full(given: Any, known: Sequence[str]) -> str | Spill:
    """Return what is to be done about rows beyond the budget; "spill" stands for `Spill()`.

    Raises:
        SpecError: Not one of those that are known.
    """
    if isinstance(given, Spill):
        return given
    if given not in known:
        hint = nearest(given, known) if isinstance(given, str) else ""
        if given == "wait":
            hint = " Prompts wait where rows are handed over as they come: vllm_tap.Tap(llm).stream(...)."
        raise SpecError(f"on_full={given!r} is not known.{hint or f' Known: {list(known)}, vllm_tap.Spill(...).'}")
    return Spill() if given == "spill" else str(given)


def at_the_end(on_full: str | Spill) -> str | Spill:
    """Return what a capture is told of a stream's terms: prompts wait, workers do not."""
    return "fail" if on_full == "wait" else on_full


def room_of(budget_bytes: int, on_full: str | Spill) -> int:
    """Return how many bytes of rows there is room for, in memory and in files."""
    return budget_bytes + (on_full.room if isinstance(on_full, Spill) else 0)
