"""Replay records that were drawn, with numpy alone: some of their readers run where torch is not installed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vllm_tap.interchange.replay import Replay

NUM_LAYERS, NUM_CHOSEN = 4, 2


def record(num_rows: int, num_experts: int = 128) -> Replay:
    """Return the record of a sequence of one token more than it has rows; the first layer is dense."""
    rng = np.random.default_rng(num_rows)
    ids = rng.integers(0, num_experts, (num_rows, NUM_LAYERS, NUM_CHOSEN))
    weights = rng.random(ids.shape, np.float32)
    ids[:, 0], weights[:, 0] = 0, 0
    kind = np.uint8 if num_experts <= 256 else np.int16
    return Replay(ids.astype(kind), weights, 0, num_rows + 1, tuple(range(1, NUM_LAYERS)))


def part(whole: Replay, start: int, stop: int) -> Replay:
    """Return the rows of a turn."""
    rows = slice(start, stop)
    return Replay(whole.ids[rows], whole.weights[rows], start, stop + 1, whole.expert_layers)


def records() -> Iterator[Replay]:
    """Return records of few and of many experts."""
    yield record(12)
    yield record(12, num_experts=384)
