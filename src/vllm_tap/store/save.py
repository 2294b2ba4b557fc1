"""Writes one capture as a dataset of one part. In the process that holds the capture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_tap.errors import DatasetError
from vllm_tap.store import index
from vllm_tap.store.facts import facts_of
from vllm_tap.store.places import place_of
from vllm_tap.store.source import RowSource
from vllm_tap.store.writer import write_part


def save(
    source: RowSource,
    path: Any,
    *,
    model: Mapping[str, str],
    versions: Mapping[str, str],
    metadata: Sequence[Mapping[str, Any] | None] | None = None,
) -> None:
    """Write a capture into a folder that holds no dataset yet; see `Capture.save`.

    Raises:
        DatasetError: It holds one, or cannot be written to.
    """
    index.require_pyarrow()
    place = place_of(path)
    if place.parts():
        raise DatasetError(f"{place.path} holds a dataset already: choose another folder.", path=place.path)
    write_part(place, source, facts_of(source, model, "", versions), metadata=metadata)
