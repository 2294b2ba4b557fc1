"""A dataset in a local folder: mapped files, drafts that take their name by rename. Wherever it is used."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import shutil
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np

from vllm_tap.errors import DatasetDamagedError, DatasetError
from vllm_tap.store import manifest
from vllm_tap.store.dtypes import Bytes
from vllm_tap.store.place import PART_PREFIX, PartTakenError

DRAFT_PREFIX: Final = ".draft-"
LOCK_NAME: Final = ".lock"

MAP_FLAGS: Final = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux's number; Python 3.13 names it
MAP_PROT: Final = mmap.PROT_READ | mmap.PROT_WRITE
"""Copy-on-write, and no swap set aside for copies that hardly anyone makes: a dataset may be larger than memory."""

MAP_FIXED: Final = 0x10  # from linux/mman.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p

MOST_REMOVALS: Final = 8
"""Attempts to remove a folder that gains files meanwhile."""

MAX_MAPS: Final = 8192
"""Files that stay mapped for later reads; a process may have 65530 maps. Tensors keep their own alive."""


@contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Turn errors of the file system into one that says what cannot be done where, and what to do."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "Make room and record again with resume=True: what is sealed stays.",
            errno.EDQUOT: "Make room and record again with resume=True: what is sealed stays.",
            errno.EACCES: "Choose a folder that you may write to.",
            errno.EROFS: "Choose a folder that you may write to.",
            errno.ENOENT: "The folder is gone: was it moved or removed?",
        }.get(error.errno or 0, "")
        named = error.filename if isinstance(error.filename, str) else ""
        where = named if os.path.dirname(named) else path  # a bare name is one of a folder that was opened before
        raise DatasetError(f"{where}: {error.strerror or error}. {advice}".rstrip(), path=str(where)) from error


def sync_folder(path: Path) -> None:
    """Make the names in a folder last."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: for as long as a draft gets or loses its own."""
    fd = os.open(folder / LOCK_NAME, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class LocalSink:
    """A file of a draft, with its space taken at once: a full disk shows before the first byte.

    Args:
        path: Of the file, which must not be there.
        nbytes: Its length.
        folder_fd: Its folder, opened, where the path may lead elsewhere by now.
    """

    def __init__(self, path: Path, nbytes: int, folder_fd: int | None = None) -> None:
        self._path = path
        with explained(path):
            name = path if folder_fd is None else path.name
            self._fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666, dir_fd=folder_fd)
            try:
                if nbytes:
                    self._reserve(nbytes)
            except BaseException:
                os.close(self._fd)
                raise

    def _reserve(self, nbytes: int) -> None:
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        with explained(self._path):
            while view:
                view = view[os.write(self._fd, view) :]

    def close(self) -> None:
        """Make the file last."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with explained(self._path):
            try:
                os.fsync(fd)
            finally:
                os.close(fd)


class LocalDraft:
    """A hidden folder beside the parts, with a lock that its writer holds for as long as it lives."""

    def __init__(self, folder: Path, part: str) -> None:
        self._folder, self._part = folder, part
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # The host stands in the name: locks of other hosts' writers cannot be seen everywhere.
            self._path = folder / f"{DRAFT_PREFIX}{socket.gethostname()}-{secrets.token_hex(8)}"
            with locked(folder):  # `clean` takes a draft without a lock for left behind
                self._path.mkdir()
                self.folder: str | None = os.path.abspath(self._path)
                self._lock = os.open(self._path / LOCK_NAME, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
                fcntl.flock(self._lock, fcntl.LOCK_EX)

    def create(self, name: str, nbytes: int) -> LocalSink:
        """Begin a file."""
        return LocalSink(self._path / name, nbytes)

    def seal(self, data: bytes, on_sealed: Callable[[], None]) -> None:
        """Write the manifest, and rename the folder to the name of the part; call a function then.

        Raises:
            PartTakenError: The part is there already.
        """
        sink = self.create(manifest.NAME, len(data))
        sink.write(data)
        sink.close()
        target = self._folder / self._part
        with explained(self._path), locked(self._folder):
            (self._path / LOCK_NAME).unlink()
            sync_folder(self._path)
            self._rename(target)
            on_sealed()
            sync_folder(self._folder)
        self._close()

    def _rename(self, target: Path) -> None:
        try:
            self._path.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise PartTakenError(
                f"{target} is there already: another process records the same samples into this folder. "
                "Give each of them its own share.",
                path=str(target),
            ) from error

    def discard(self) -> None:
        """Remove the draft."""
        _remove(self._path)
        self._close()

    def _close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


class LocalPlace:
    """A local folder."""

    is_folder = True

    def __init__(self, folder: Path) -> None:
        self.path = str(folder)
        self._folder = folder
        self._maps: OrderedDict[str, Bytes] = OrderedDict()

    def parts(self) -> list[str]:
        """Return the names of the parts."""
        try:
            with explained(self._folder), os.scandir(self._folder) as entries:
                return sorted(entry.name for entry in entries if entry.name.startswith(PART_PREFIX))
        except DatasetError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return []
            raise

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file."""
        path = self._folder / name
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise DatasetDamagedError(f"{path} has {size} bytes, at most {limit} can be", path=str(path))
                return file.read(size + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror}", path=str(path)) from error

    def size(self, name: str) -> int | None:
        """Return the length of a file."""
        try:
            return (self._folder / name).stat().st_size
        except OSError:
            return None

    def bytes(self, name: str, start: int, stop: int) -> Bytes:
        """Return bytes of a file, mapped copy-on-write: whoever writes into them changes a copy of his own."""
        whole = self._maps.get(name)
        if whole is None:
            whole = self._map(name)
            self._maps[name] = whole
            if len(self._maps) > MAX_MAPS:
                self._maps.popitem(last=False)
        if not 0 <= start <= stop <= len(whole):
            raise DatasetDamagedError(f"{self._folder / name} has {len(whole)} bytes, needed are {stop}", path=name)
        return whole[start:stop]

    def _map(self, name: str) -> Bytes:
        path = self._folder / name
        try:
            with open(path, "rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if not size:
                    return np.empty(0, np.uint8)
                return np.frombuffer(_mapped(file.fileno(), size), np.uint8)
        except FileNotFoundError as error:
            raise DatasetDamagedError(f"{path} is missing", path=str(path)) from error
        except (OSError, ValueError) as error:
            raise DatasetError(f"{path}: {error}", path=str(path)) from error

    def draft(self, part: str) -> LocalDraft:
        """Begin a part."""
        return LocalDraft(self._folder, part)

    def clean(self) -> int:
        """Remove drafts of this host whose writer is gone: nobody holds their lock."""
        drafts = list(self._folder.glob(f"{DRAFT_PREFIX}{socket.gethostname()}-*"))
        if not drafts:
            return 0
        with explained(self._folder), locked(self._folder):
            left = [draft for draft in drafts if _is_left(draft)]
            for draft in left:
                _remove(draft)
        return len(left)


def _mapped(fd: int, nbytes: int) -> mmap.mmap:
    """Map a file, and keep no descriptor of it: a process has 1024 as a rule, and a dataset more shards.

    Raises:
        OSError: It cannot be mapped.
    """
    if sys.version_info >= (3, 13):
        return mmap.mmap(fd, nbytes, flags=MAP_FLAGS, prot=MAP_PROT, trackfd=False)
    # Python's own map of a file holds a descriptor. One of nothing holds the place, into which the file is mapped.
    place = mmap.mmap(-1, nbytes, flags=MAP_FLAGS | mmap.MAP_ANONYMOUS, prot=MAP_PROT)
    address = ctypes.addressof(ctypes.c_char.from_buffer(place))
    if _libc.mmap(address, nbytes, MAP_PROT, MAP_FLAGS | MAP_FIXED, fd, 0) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return place


def _remove(draft: Path) -> None:
    """Remove a draft, into which workers of a writer that is gone may put a last file meanwhile."""
    for _ in range(MOST_REMOVALS):
        shutil.rmtree(draft, ignore_errors=True)
        if not draft.exists():
            break


def _is_left(draft: Path) -> bool:
    """Tell whether no process holds the lock of a draft."""
    try:
        fd = os.open(draft / LOCK_NAME, os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return draft.is_dir()
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True
