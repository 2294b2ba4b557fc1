"""Replay records as trainers and servers exchange them. In any process.

What stands for the last token, which never entered the model, differs: vLLM, slime, SkyRL, AReaL and the payload of
prime-rl leave it out, verl fills up with zeros. Layers without experts have 0 everywhere.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import numpy.typing as npt

from vllm_tap.errors import SpecError
from vllm_tap.interchange.replay import Replay


def vllm(record: Replay) -> npt.NDArray[Any]:
    """Return `CompletionOutput.routed_experts`: [T, L, K], uint8, uint16 or int32."""
    return record.ids.astype(np.uint16) if record.ids.dtype == np.int16 else record.ids


def vllm_http(record: Replay) -> str:
    """Return what vLLM's server answers: the bytes of an `.npy` file in base64."""
    buffer = io.BytesIO()
    np.save(buffer, vllm(record), allow_pickle=False)
    return base64.b64encode(buffer.getbuffer()).decode("ascii")


def verl(record: Replay, left_padding: int = 0, num_tokens: int | None = None) -> npt.NDArray[np.int16]:
    """Return verl's layout: int16 [1, length, L, K], a row for each position of the padded sequence, else 0.

    Args:
        record: Experts of a sequence.
        left_padding: Tokens that stand before the prompt.
        num_tokens: Length of the padded sequence; up to its last token unless it is given.

    Raises:
        SpecError: The rows do not fit.
    """
    first = left_padding + record.start
    total = left_padding + record.num_tokens if num_tokens is None else num_tokens
    if first + len(record.ids) > total or record.ids.max(initial=0) > np.iinfo(np.int16).max:
        raise SpecError(f"{len(record.ids)} rows from {first} on do not fit into {total} tokens of int16.")
    aligned = np.zeros((1, total, *record.ids.shape[1:]), np.int16)
    aligned[0, first : first + len(record.ids)] = record.ids
    return aligned


def slime(record: Replay) -> dict[str, Any]:
    """Return the entries of slime's `meta_info`: int32 values in base64, and where they start."""
    return {"routed_experts": _text(record.ids.astype(np.int32)), "routed_experts_start_len": record.start}


def areal(record: Replay) -> npt.NDArray[np.int32]:
    """Return AReaL's array: int32 [T, L * K]."""
    return record.ids.astype(np.int32).reshape(len(record.ids), -1)


def skyrl(record: Replay) -> dict[str, Any]:
    """Return SkyRL's packed array `{data, shape, dtype}`, in the smallest dtype of the ids that occur."""
    largest = int(record.ids.max(initial=0))
    kind = np.uint8 if largest < 2**8 else np.int16 if largest < 2**15 else np.int32
    return _packed(record.ids.astype(kind))


def prime_rl(record: Replay, *, weights: bool = False) -> dict[str, Any]:
    """Return the payload `{data, shape, dtype, start}` of prime-rl and verifiers.

    Args:
        record: Experts of a sequence.
        weights: Whether combine weights go along: int32 [T, L, 2 K], the ids and then the bits of float32 weights.
    """
    if not weights:
        return {**_packed(record.ids), "start": record.start}
    bits = np.ascontiguousarray(record.weights).view(np.int32)
    return {**_packed(np.concatenate([record.ids.astype(np.int32), bits], axis=2)), "start": record.start}


def tunix(record: Replay) -> npt.NDArray[np.int32]:
    """Return an array int32 [num_tokens - start, L, K]; -1 where nothing is to be replayed."""
    ids = np.full((record.num_tokens - record.start, *record.ids.shape[1:]), -1, np.int32)
    ids[: len(record.ids), list(record.expert_layers)] = record.ids[:, list(record.expert_layers)]
    return ids


def _packed(array: npt.NDArray[Any]) -> dict[str, Any]:
    return {"data": _text(array), "shape": list(array.shape), "dtype": array.dtype.name}


def _text(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).data).decode("ascii")
