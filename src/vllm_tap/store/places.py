"""From a path or a URL to the place that it names. Wherever a dataset is used."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm_tap.errors import DatasetError
from vllm_tap.store.local import LocalPlace
from vllm_tap.store.place import Place


def place_of(path: Any) -> Place:
    """Return the place that a path names: a `Path`, a text, or a URL such as `s3://bucket/run`.

    Raises:
        DatasetError: The URL needs fsspec, which is not installed, or a file system that it does not know.
    """
    text = os.fspath(path)
    scheme, found, rest = text.partition("://")
    if not found:
        return LocalPlace(Path(text))
    if scheme == "file":
        return LocalPlace(Path(rest))
    try:
        from vllm_tap.store.remote import RemotePlace

        return RemotePlace(text)
    except (ImportError, ValueError) as error:
        raise DatasetError(f"{text}: {error}. URLs need fsspec: pip install 'vllm-tap[store]'.", path=text) from error
