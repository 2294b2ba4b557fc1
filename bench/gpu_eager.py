"""Rows of compiled and captured graphs against those of an eager engine with the same weights. Part of bench/gpu.py."""

from __future__ import annotations

from typing import Any

from gpu_setting import Setting, capture, start_engine, stop_engine

MEMORY = 0.15
"""Of the device: the weights of an 8B model and a small cache, beside two engines of 0.4 each."""

TOLERANCE = 0.05
"""Of the rows' root mean square. Both sides round to bfloat16 (one part in 512) after other sums, layer after layer;
unrelated rows differ by 1.4, the square root of two."""


def check_against_eager(setting: Setting, tapped: Any) -> dict[str, Any]:
    """Capture two prompts of chunks and single tokens in both engines, and compare all layers.

    Returns:
        The largest difference of a layer's rows, as a share of their root mean square, and which layer that is.
    """
    prompts = setting.prompts((2, 8 if setting.smoke else 700, 1))
    spec = {"hidden_states": "all", "embeddings": True, "final_hidden_states": True}
    result = capture(setting, tapped, prompts, 1, spec)[1]
    eager = start_engine(setting, True, enforce_eager=True, gpu_memory_utilization=MEMORY)
    reference = capture(setting, eager, prompts, 1, spec)[1]
    differences = {}
    for mine, other in zip(result, reference, strict=True):
        for layer in result.layers["hidden_states"]:
            differences[f"hidden_states[{layer}]"] = _difference(mine.hidden_states[layer], other.hidden_states[layer])
        for stream in ("embeddings", "final_hidden_states"):
            differences[stream] = _difference(getattr(mine, stream), getattr(other, stream))
    del reference
    stop_engine(eager)
    worst = max(differences, key=lambda place: differences[place])
    return {"largest difference": differences[worst], "where": worst, "fine": differences[worst] < TOLERANCE}


def _difference(rows: Any, reference: Any) -> float:
    rows, reference = rows.float(), reference.float()
    return float((rows - reference).square().mean().sqrt() / reference.square().mean().sqrt())
