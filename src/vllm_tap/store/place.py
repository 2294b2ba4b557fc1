"""Place of a dataset: a local folder, or a folder of any file system that fsspec knows. Wherever it is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vllm_tap.errors import DatasetError
from vllm_tap.store.dtypes import Bytes


class PartTakenError(DatasetError):
    """The part is there already: another writer has sealed it."""


class Sink(Protocol):
    """A file that is being written."""

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""

    def close(self) -> None:
        """Make the file last; nothing can be written afterwards."""


class Draft(Protocol):
    """A part that is being written. Nobody sees it before it is sealed.

    Attributes:
        folder: Its folder, which other processes of this host can write into; None if there is none.
    """

    folder: str | None

    def create(self, name: str, nbytes: int) -> Sink:
        """Begin a file of so many bytes."""

    def seal(self, manifest: bytes, on_sealed: Callable[[], None]) -> None:
        """Make the part visible, with its manifest, at once; then call a function, before anything else may fail."""

    def discard(self) -> None:
        """Remove what was written."""


class Place(Protocol):
    """A folder of parts. Names have one slash at most: part and file.

    Attributes:
        path: Its path or URL.
        is_folder: Whether it is a folder of this host, into which other processes can write.
    """

    path: str
    is_folder: bool

    def parts(self) -> list[str]:
        """Return the names of the folders of parts, sealed or not, in order."""

    def read(self, name: str, limit: int) -> bytes | None:
        """Return a small file, or None where there is none; one that is longer than `limit` is refused."""

    def size(self, name: str) -> int | None:
        """Return the length of a file, or None where there is none."""

    def bytes(self, name: str, start: int, stop: int) -> Bytes:
        """Return bytes of a file: a view of its pages where they can be mapped, else a copy."""

    def draft(self, part: str) -> Draft:
        """Begin a part."""

    def clean(self) -> int:
        """Remove what killed writers left behind; return how many drafts that were."""


PART_PREFIX = "part-"


def part_name(first_sample: int) -> str:
    """Return the folder of the part that begins with a sample: two of one name cannot be."""
    return f"{PART_PREFIX}{first_sample:012d}"
