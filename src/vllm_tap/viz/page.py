"""A page of HTML that shows samples of a dataset, token by token; it needs no network. In the user's process."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from vllm_tap.errors import SpecError
from vllm_tap.viz.lens import Guess, Lens

TEMPLATE: Final = Path(__file__).with_name("page.html")
MOST_ROWS: Final = 2048
"""Rows of a sample that are shown: its first ones."""


def page(
    dataset: Any, samples: Sequence[int], text_of: Callable[[int], str] | None = None, lens: Lens | None = None
) -> str:
    """Return the page.

    Args:
        dataset: A `Dataset`.
        samples: Samples to show.
        text_of: Text of a token id; without it, ids are shown.
        lens: Guesses at the next token, such as `lens_of(model)`; without it, none are shown.

    Raises:
        SpecError: There is nothing to show.
    """
    if not samples:
        raise SpecError("a page needs a sample to show.")
    shown = {
        "model": dataset.facts.model.get("name", ""),
        "samples": [_sample(dataset, number, text_of, lens) for number in samples],
    }
    # Inside a script, no tag may end it: "</" is written so that JSON reads the same.
    data = json.dumps(shown, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    title = html.escape(f"{shown['model']} - vllm-tap")
    return TEMPLATE.read_text(encoding="utf-8").replace("{{title}}", title).replace("{{data}}", data)


def _sample(dataset: Any, number: int, text_of: Callable[[int], str] | None, lens: Lens | None) -> dict[str, Any]:
    sample = dataset.sample(number)
    ids = dataset.label("token_ids", sample.start, sample.stop)[:MOST_ROWS].tolist()
    positions = dataset.label("positions", sample.start, sample.stop)[:MOST_ROWS].tolist()
    num_prompt = len(sample.prompt_token_ids)
    found: dict[str, Any] = {
        "number": sample.index,
        "rows": len(sample),
        "tokens": [text_of(token) if text_of else str(token) for token in ids],
        "ids": ids,
        "positions": positions,
        "generated": [position >= num_prompt for position in positions],
        "text": sample.text or "",
        "metadata": sample.metadata,
    }
    if "hidden_states" in dataset.layers:
        layers = dataset.layers["hidden_states"]
        rows = [sample.hidden_states.numpy(layer)[:MOST_ROWS].astype(np.float64) for layer in layers]
        found["norms"] = {"layers": layers, "values": [_rounded(np.linalg.norm(one, axis=1)) for one in rows]}
        if lens is not None:
            found["lens"] = {"layers": layers, **_guesses([lens(one.astype(np.float32)) for one in rows], text_of)}
    if "expert_ids" in dataset.layers:
        layers = dataset.layers["expert_ids"]
        chosen = [sample.expert_ids.numpy(layer)[:MOST_ROWS].tolist() for layer in layers]
        found["experts"] = {"layers": layers, "values": chosen}
    return found


def _guesses(guesses: Sequence[Guess], text_of: Callable[[int], str] | None) -> dict[str, Any]:
    """Return guesses layer by layer: numbers of words, the words, and shares."""
    numbers: dict[int, int] = {}
    tokens = [[numbers.setdefault(token, len(numbers)) for token in one.token_ids.tolist()] for one in guesses]
    words = [text_of(token) if text_of else str(token) for token in numbers]
    return {"words": words, "tokens": tokens, "shares": [_rounded(one.shares) for one in guesses]}


def _rounded(values: Any) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


def write(text: str, path: str | Path) -> None:
    """Write a page.

    Raises:
        SpecError: The file cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"{path} cannot be written: {error.strerror}.", path=str(path)) from error
