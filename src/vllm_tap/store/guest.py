"""A draft of another process, into which this one writes files of its own. In a worker that writes for a client."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from vllm_tap.errors import DatasetError
from vllm_tap.store.local import DRAFT_PREFIX, LocalSink, explained

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class GuestDraft:
    """A draft that a client has made, opened once: what its path leads to later does not matter.

    Args:
        path: Of the draft, absolute and without a dot.
        below: Folder in which it must lie, without a symbolic link on the way; None where any will do.

    Raises:
        DatasetError: There is no such folder here, it is no draft, it lies elsewhere, or nothing can be written there.
    """

    def __init__(self, path: str, below: str | None) -> None:
        self._path = Path(path)
        if not os.path.isabs(path) or os.path.normpath(path) != path or "\0" in path:
            raise DatasetError(f"{path!r} is not the path of a folder from the root on.", path=path)
        if not self._path.name.startswith(DRAFT_PREFIX):
            raise DatasetError(f"{path} is no draft of a dataset: workers write nowhere else.", path=path)
        self._fd = _opened(path, below)
        if not os.access(".", os.W_OK | os.X_OK, dir_fd=self._fd, effective_ids=True):
            self.close()
            raise DatasetError(f"{path}: the worker, as user {os.geteuid()}, may not write there.", path=path)

    def create(self, name: str, nbytes: int) -> LocalSink:
        """Begin a file of this folder, which must not be there."""
        if os.sep in name:
            raise DatasetError(f"{name!r} is no file of {self._path}.", path=str(self._path))
        return LocalSink(self._path / name, nbytes, self._fd)

    def sync(self) -> None:
        """Make the names of the files last."""
        with explained(self._path):
            os.fsync(self._fd)

    def close(self) -> None:
        """Let go of the folder."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _opened(path: str, below: str | None) -> int:
    """Return a descriptor of a folder."""
    try:
        if below is None:
            return os.open(path, _FOLDER | os.O_NOFOLLOW)
        return _opened_below(below, _names_below(path, below))
    except FileNotFoundError as error:
        raise DatasetError(
            f"{path} is not there where the worker runs: workers write into folders that they see under the same path "
            'as the client, on a disk that both have. Use such a folder, or writers="client".',
            path=path,
        ) from error
    except OSError as error:
        if below is not None and error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise DatasetError(
                f"{path}: a part of it below {below} is a symbolic link or no folder, and the worker follows none for "
                "clients of a network.",
                path=path,
            ) from error
        raise DatasetError(f"{path}: {error.strerror}", path=path) from error


def _names_below(path: str, below: str) -> list[str]:
    """Return the names on the way from a folder to another one in it."""
    relative = os.path.relpath(path, below)
    if relative.startswith(".."):
        raise DatasetError(
            f"{path} is not below {below}: the worker writes nowhere else for clients of a network. Choose a folder "
            'there, or use writers="client".',
            path=path,
        )
    return relative.split(os.sep)


def _opened_below(below: str, names: list[str]) -> int:
    """Return a descriptor of a folder, reached from another one by names that are no symbolic links."""
    fd = os.open(below, _FOLDER)
    for name in names:
        try:
            inner = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=fd)
        finally:
            os.close(fd)
        fd = inner
    return fd
