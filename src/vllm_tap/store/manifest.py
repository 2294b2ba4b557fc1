"""The manifest of a part: what is in its files, with their checksums. A part is complete when it is there."""

from __future__ import annotations

import re
import zlib
from typing import Final

import msgspec

from vllm_tap.errors import DatasetDamagedError
from vllm_tap.store.facts import FORMAT

NAME: Final = "manifest.json"
FACTS_NAME: Final = "facts.json"
INDEX_NAME: Final = "index.parquet"
LABELS_NAME: Final = "labels.safetensors"

MAX_BYTES: Final = 64 << 20
"""A manifest or a file of facts is not longer."""

MAX_COUNT: Final = 2**48

_HEAD: Final = re.compile(rb'\{"crc32":"([0-9a-f]{8})",')
_PLAIN_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class FileFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, order=True):
    """A file of a part: its name, length and CRC-32 (that of zlib)."""

    name: str
    nbytes: int
    crc32: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part's statement about itself.

    Attributes:
        format: `facts.FORMAT`.
        facts: SHA-256 of the part's file of facts, in hexadecimal digits.
        first_sample: Number of the first sample; the part holds `num_samples` from there on.
        num_samples: Samples, also those without rows.
        num_sequences: Sequences: a completion of a sample each.
        num_rows: Rows of every layer.
        prompts: SHA-256 of the prompts and their metadata; empty if they were not written as prompts.
        created: When the part was sealed, UTC, ISO 8601.
        files: The other files, by name.
    """

    format: str
    facts: str
    first_sample: int
    num_samples: int
    num_sequences: int
    num_rows: int
    prompts: str
    created: str
    files: tuple[FileFacts, ...]

    def file(self, name: str) -> FileFacts | None:
        """Return what is said of a file."""
        return next((file for file in self.files if file.name == name), None)


def encode(manifest: Manifest) -> bytes:
    """Return the file: a JSON object whose first field is the CRC-32 of all that follows that field's comma."""
    rest = msgspec.json.encode(manifest)[1:] + b"\n"
    return b'{"crc32":"%08x",' % zlib.crc32(rest) + rest


def decode(data: bytes, path: str) -> Manifest:
    """Read and check a manifest.

    Raises:
        DatasetDamagedError: It is none, its checksum is another, or it says what cannot be.
    """
    head = _HEAD.match(data)
    if head is None:
        raise DatasetDamagedError(f"{path} does not begin as a manifest", path=path)
    rest = data[head.end() :]
    if int(head[1], 16) != zlib.crc32(rest):
        raise DatasetDamagedError(f"{path} has another checksum than it states: it was changed or cut", path=path)
    try:
        manifest = msgspec.json.decode(b"{" + rest, type=Manifest)
        _check(manifest)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DatasetDamagedError(f"{path} is not valid: {error}", path=path) from error
    return manifest


def _check(manifest: Manifest) -> None:
    if manifest.format != FORMAT:
        raise ValueError(f"format {manifest.format!r}, this version reads {FORMAT!r}")
    for name in ("first_sample", "num_samples", "num_sequences", "num_rows"):
        if not 0 <= getattr(manifest, name) <= MAX_COUNT:
            raise ValueError(f"{name} is {getattr(manifest, name)}")
    names = [file.name for file in manifest.files]
    if len(set(names)) != len(names):
        raise ValueError("a file is named twice")
    for file in manifest.files:
        if not _PLAIN_NAME.fullmatch(file.name) or file.name == NAME:
            raise ValueError(f"file name {file.name!r}")
        if not 0 <= file.nbytes <= MAX_COUNT or not 0 <= file.crc32 < 2**32:
            raise ValueError(f"{file.name}: {file.nbytes} bytes, CRC-32 {file.crc32}")
