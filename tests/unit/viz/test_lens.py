"""The logit lens against Hugging Face's logits."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from synthetic_rows import MODEL, SyntheticCapture
from vllm_tap.cli import main
from vllm_tap.errors import SpecError
from vllm_tap.store.dataset import open_dataset
from vllm_tap.store.save import save
from vllm_tap.viz.lens import Guess, lens_of
from vllm_tap.viz.page import page


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3_moe"])
def test_the_last_layers_guess_is_what_the_model_says(tiny_model: Callable[..., Path], family: str) -> None:
    """Tokens and their probabilities of more rows than are computed at once; other layers give other tokens."""
    folder = tiny_model(family)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    given = torch.randint(0, 256, (1, 300), generator=torch.Generator().manual_seed(0))
    inputs: list[torch.Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0])) for module in last_two(model)]
    with torch.inference_mode():
        expected = model(given).logits[0].softmax(-1).max(-1)
    for hook in hooks:
        hook.remove()
    lens = lens_of(str(folder))
    found = lens(inputs[1].numpy())
    assert found.token_ids.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(found.shares, expected.values.numpy(), rtol=1e-4)
    assert (lens(inputs[0].numpy()).token_ids != found.token_ids).any()
    assert lens(inputs[0][:0].numpy()).token_ids.shape == (0,)


def last_two(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return the last decoder layer and the final norm."""
    return [model.model.layers[-1], model.model.norm]


def test_no_model_is_an_error_of_one_line(tmp_path: Path) -> None:
    """As of a folder that holds something else."""
    with pytest.raises(SpecError, match="cannot be loaded"):
        lens_of(str(tmp_path))


def test_a_page_shows_guesses(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Of each row and layer, as the lens has them; the command takes a model for it."""
    capture = SyntheticCapture(["a", "b"])
    save(capture, tmp_path / "run", model=MODEL, versions={})
    dataset = open_dataset(tmp_path / "run")

    def lens(rows: np.ndarray) -> Guess:
        return Guess(np.arange(len(rows)) % 3 + 40, np.linspace(0, 1, len(rows), dtype=np.float32))

    shown = data_of(page(dataset, [0], lambda token: f"<{token}>", lens))["samples"][0]
    assert shown["lens"]["layers"] == dataset.layers["hidden_states"]
    words = [[shown["lens"]["words"][number] for number in layer] for layer in shown["lens"]["tokens"]]
    assert words == [[f"<{number % 3 + 40}>" for number in range(shown["rows"])]] * len(words)
    assert shown["lens"]["shares"][0][-1] == 1.0
    assert "lens" not in data_of(page(dataset, [0]))["samples"][0]
    assert main(["view", str(tmp_path / "run"), "--to", str(tmp_path / "a.html"), "--lens", str(tmp_path)]) == 1


def data_of(text: str) -> dict:
    """Return what a page shows."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])
