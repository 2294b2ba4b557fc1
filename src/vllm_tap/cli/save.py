"""Writes a capture into one safetensors file. Runs in the user's process."""

from __future__ import annotations

import importlib.util
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from vllm_tap import __version__
from vllm_tap.errors import SpecError
from vllm_tap.streams import SINGLE_STREAMS

FORMAT: Final = "vllm-tap capture 1"
"""Names the arrangement of tensors and metadata in a file; rises when it changes."""


SUFFIX: Final = ".safetensors"


def check_target(path: Path, force: bool) -> None:
    """Refuse a target before anything expensive happens.

    Raises:
        SpecError: It is no name for a safetensors file, that package is missing, the file exists, or its folder does
            not or cannot be written to.
    """
    if path.suffix != SUFFIX and not path.is_dir():
        raise SpecError(
            f"{path}: rows are saved in a safetensors file: name it {path.with_suffix(SUFFIX).name}.", path=str(path)
        )
    if importlib.util.find_spec("safetensors") is None:
        raise SpecError("--save needs the package safetensors: pip install safetensors.")
    try:
        if path.exists() and (path.is_dir() or not force):
            advice = "name a file" if path.is_dir() else "choose another name, or add --force to replace it"
            raise SpecError(f"{path} exists already: {advice}.", path=str(path))
        if not path.parent.is_dir():
            raise SpecError(f"{path.parent} is not a folder: create it first.", path=str(path))
        draft = draft_of(path)
        draft.touch()
        draft.unlink()
    except OSError as error:
        raise SpecError(
            f"{path} cannot be written ({error.strerror}): choose another place or name.", path=str(path)
        ) from error


def save(result: Any, path: Path, model: str) -> int:
    """Write all rows of a capture; the file appears when it is complete. See docs/format.md for the names in it.

    Args:
        result: A `Capture`.
        path: The file; one that exists is replaced.
        model: What the engine was started with, for the metadata.

    Returns:
        Size of the file in bytes.

    Raises:
        SpecError: The file could not be written.

    Source:
        See `Capture.conventions`, which the metadata repeats.

    Cost:
        One gather for each sample and layer, all held in memory until the file is written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    draft = draft_of(path)
    try:
        save_file(tensors(result), draft, metadata(result, model))
        draft.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SpecError(f"{path} could not be written: {reason}.", path=str(path)) from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
    return path.stat().st_size


def draft_of(path: Path) -> Path:
    """Return the file that is written before it takes its name."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def tensors(result: Any) -> dict[str, Any]:
    """Return the tensors of a file by their names: `{sample}.{stream}.{layer}`, and labels beside them."""
    named: dict[str, Any] = {}
    for index in finished(result):
        sample = result[index]
        named[f"{index}.positions"] = sample.positions
        named[f"{index}.token_ids"] = sample.token_ids
        for stream in result.layers:
            rows = getattr(sample, stream)
            if stream in SINGLE_STREAMS:
                named[f"{index}.{stream}"] = rows.contiguous()
            else:
                named.update({f"{index}.{stream}.{layer}": tensor.contiguous() for layer, tensor in rows.items()})
    return named


def finished(result: Any) -> list[int]:
    """Return the numbers of the samples that have rows: all, unless the capture was interrupted."""
    return [number for number, output in enumerate(result.outputs) if output is not None]


def metadata(result: Any, model: str) -> dict[str, str]:
    """Return what a reader needs to know of the rows; safetensors carries texts only."""
    return {
        "format": FORMAT,
        "vllm_tap": __version__,
        "model": model,
        "num_samples": str(len(result)),
        "unfinished": json.dumps(sorted(set(range(len(result))).difference(finished(result)))),
        "spec": result.spec.to_json(),
        "layers": json.dumps(result.layers),
        "conventions": json.dumps(result.conventions),
    }
