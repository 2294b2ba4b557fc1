"""A dataset in a file system that fsspec knows, such as an object store. Wherever it is used.

There is no rename of folders: files of a part are put under their names, and the manifest last. A part without one is
not there for readers, and its files are overwritten by the writer that comes next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import fsspec
import numpy as np

from vllm_tap.errors import DatasetDamagedError, DatasetError
from vllm_tap.store import manifest
from vllm_tap.store.dtypes import Bytes
from vllm_tap.store.place import PART_PREFIX, PartTakenError

BUFFER_BYTES: Final = 16 << 20


class RemoteSink:
    """A file of a part; file systems commit it when it is closed."""

    def __init__(self, fs: Any, path: str) -> None:
        self._file = fs.open(path, "wb", block_size=BUFFER_BYTES)
        self._path = path

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            raise DatasetError(f"{self._path}: {error}", path=self._path) from error

    def close(self) -> None:
        """Commit the file."""
        try:
            self._file.close()
        except OSError as error:
            raise DatasetError(f"{self._path}: {error}", path=self._path) from error


class RemoteDraft:
    """A folder of a part, not valid before its manifest is there."""

    folder: str | None = None

    def __init__(self, fs: Any, folder: str) -> None:
        self._fs, self._folder = fs, folder
        if fs.exists(f"{folder}/{manifest.NAME}"):
            raise PartTakenError(f"{folder} is sealed already: another process records the same samples", path=folder)
        fs.makedirs(folder, exist_ok=True)

    def create(self, name: str, nbytes: int) -> RemoteSink:
        """Begin a file."""
        return RemoteSink(self._fs, f"{self._folder}/{name}")

    def seal(self, data: bytes, on_sealed: Callable[[], None]) -> None:
        """Put the manifest; call a function then."""
        sink = self.create(manifest.NAME, len(data))
        sink.write(data)
        sink.close()
        on_sealed()

    def discard(self) -> None:
        """Remove the files."""
        self._fs.rm(self._folder, recursive=True)


class RemotePlace:
    """A folder of a file system."""

    is_folder = False

    def __init__(self, url: str) -> None:
        self.path = url
        self._fs, self._folder = fsspec.core.url_to_fs(url.rstrip("/"))

    def parts(self) -> list[str]:
        """Return the names of the parts."""
        try:
            paths = self._fs.ls(self._folder, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = [path.rstrip("/").rpartition("/")[2] for path in paths]
        return sorted(name for name in names if name.startswith(PART_PREFIX))

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file."""
        size = self.size(name)
        if size is None:
            return None
        if size > limit:
            raise DatasetDamagedError(f"{self.path}/{name} has {size} bytes, at most {limit} can be", path=name)
        return bytes(self._fs.cat_file(f"{self._folder}/{name}"))

    def size(self, name: str) -> int | None:
        """Return the length of a file."""
        try:
            return int(self._fs.size(f"{self._folder}/{name}"))
        except FileNotFoundError:
            return None

    def bytes(self, name: str, start: int, stop: int) -> Bytes:
        """Return bytes of a file, fetched."""
        try:
            data = self._fs.cat_file(f"{self._folder}/{name}", start=start, end=stop) if stop > start else b""
        except FileNotFoundError as error:
            raise DatasetDamagedError(f"{self.path}/{name} is missing", path=name) from error
        if len(data) != stop - start:
            raise DatasetDamagedError(f"{self.path}/{name}: {len(data)} bytes of {start} to {stop}", path=name)
        return np.frombuffer(bytearray(data), np.uint8)

    def draft(self, part: str) -> RemoteDraft:
        """Begin a part."""
        return RemoteDraft(self._fs, f"{self._folder}/{part}")

    def clean(self) -> int:
        """Leave what is there: it is overwritten when its part is written again."""
        return 0
