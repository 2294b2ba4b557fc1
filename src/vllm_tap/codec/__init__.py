"""Codecs for payloads that leave the host, by name.

Runs in the worker that encodes and in the client that decodes. `lz4` and `zstandard` are imported when first used.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Callable
from typing import Final

from vllm_tap.codec.base import Codec
from vllm_tap.codec.bytesplit import ByteSplit
from vllm_tap.codec.lz4 import LZ4
from vllm_tap.codec.raw import Raw
from vllm_tap.codec.zstd import Zstd
from vllm_tap.errors import SpecError

__all__ = ["Codec", "get", "installed", "names"]

CODECS: Final[dict[str, Callable[[], Codec]]] = {"raw": Raw, "lz4": LZ4, "zstd": Zstd, "bytesplit": ByteSplit}
PACKAGES: Final = {"lz4": "lz4", "zstd": "zstandard", "bytesplit": "zstandard"}


def names() -> tuple[str, ...]:
    """Return the names of all codecs, whether their packages are installed or not."""
    return tuple(CODECS)


def get(name: str) -> Codec:
    """Return the codec called `name`.

    Raises:
        SpecError: there is no such codec.
    """
    if name not in CODECS:
        nearest = difflib.get_close_matches(name, CODECS, n=1, cutoff=0.0)[0]
        raise SpecError(f"there is no codec {name!r}: did you mean {nearest!r}? Known: {list(CODECS)}", codec=name)
    return CODECS[name]()


def installed(name: str) -> bool:
    """Tell whether the codec called `name` has its package here. Imports nothing."""
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name]) is not None
