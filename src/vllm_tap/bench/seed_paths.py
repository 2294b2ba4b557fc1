"""The two payloads of the founding document, each with the worker's half and the client's, and what they take alone.

The worker's halves also run in an engine's worker: `SeedExtension` is vLLM's `worker_extension_cls` in the benchmark,
so that the old payloads go the whole way that vLLM's calls go. Nothing of this is part of the package's interface.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import torch

from vllm_tap.legacy.payload import deserialize

Tensors = dict[int, torch.Tensor]
Payload = dict[int, dict[str, Any]]


def as_lists(tensors: Mapping[int, torch.Tensor]) -> Payload:
    """Return the payload that stalled: one Python object a number."""
    return {
        n: {"data": t.float().numpy().tolist(), "shape": list(t.shape), "dtype": str(t.dtype)}
        for n, t in tensors.items()
    }


def from_lists(payload: Payload) -> Tensors:
    """Return the tensors of nested lists."""
    return {n: _cast(np.array(entry["data"], np.float32), entry) for n, entry in payload.items()}


def as_float32(tensors: Mapping[int, torch.Tensor]) -> Payload:
    """Return the payload of the cure: float32 bytes, whatever the dtype."""
    return {
        n: {"data": t.float().numpy().tobytes(), "shape": list(t.shape), "dtype": str(t.dtype)}
        for n, t in tensors.items()
    }


def from_float32(payload: Payload) -> Tensors:
    """Return the tensors of float32 bytes."""
    return {
        n: _cast(np.frombuffer(entry["data"], np.float32).reshape(entry["shape"]).copy(), entry)
        for n, entry in payload.items()
    }


def _cast(values: np.ndarray[Any, Any], entry: Mapping[str, Any]) -> torch.Tensor:
    return torch.from_numpy(values).to(getattr(torch, entry["dtype"].removeprefix("torch.")))


PATHS: Final = {"lists": (as_lists, from_lists), "float32": (as_float32, from_float32)}


class SeedExtension:
    """Methods of the worker for the benchmark alone: they reply what the document's worker replied."""

    vllm_tap: Any
    seed_tensors: Tensors

    def seed_keep(self) -> int:
        """Keep the rows that the worker calls have taken, as the tensors that the old worker held."""
        self.seed_tensors = deserialize(self.vllm_tap.get_captured_hidden_states())
        return sum(tensor.nbytes for tensor in self.seed_tensors.values())

    def seed_payload(self, path: str, num_rows: int) -> Payload:
        """Reply the first rows of every layer."""
        return PATHS[path][0]({number: tensor[:num_rows] for number, tensor in self.seed_tensors.items()})


def convert(stack: torch.Tensor, path: str, num_rounds: int) -> dict[str, float]:
    """Return the median milliseconds of both halves, without any way between them, a layer at a time."""
    worker, client = PATHS[path]
    halves: dict[str, list[float]] = {"worker": [], "client": []}
    for _ in range(num_rounds):
        spent = {"worker": 0.0, "client": 0.0}
        for number, layer in enumerate(stack):
            seconds, payload = timed(lambda n=number, t=layer: worker({n: t}))  # type: ignore[misc]
            spent["worker"] += seconds
            spent["client"] += timed(lambda p=payload: client(p))[0]  # type: ignore[misc]
        for half, seconds in spent.items():
            halves[half].append(seconds)
    return {f"{half}_ms": 1e3 * statistics.median(seconds) for half, seconds in halves.items()}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a call and its result."""
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result
