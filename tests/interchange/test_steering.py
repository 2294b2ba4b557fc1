"""steering_vectors, repeng and toploc, unmodified, over directions and states. Skips where they are not installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from made_rows import made
from readers import reader
from vllm_tap.interchange.directions import control_vector, steering_vector
from vllm_tap.interchange.proofs import toploc_activations, toploc_proofs
from vllm_tap.store.accumulators import LabelMeans

WIDTH, LAYER = 64, 1


@pytest.fixture(scope="module")
def model() -> Any:
    """A random Llama of three layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def direction() -> np.ndarray:
    """The difference of means of two sets of rows."""
    means = LabelMeans()
    capture = made(width=WIDTH)
    rows = capture.rows("hidden_states", LAYER)
    means.update(rows, np.where(np.arange(len(rows)) % 2, "odd", "even"))
    return means.difference("odd", "even")


def after(model: Any, layer: int) -> torch.Tensor:
    """Return the residual stream behind a layer: what goes into the next one."""
    seen: list[torch.Tensor] = []
    hook = model.model.layers[layer + 1].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(torch.arange(7)[None], use_cache=False)
    hook.remove()
    return seen[0]


def check(model: Any, plain: torch.Tensor, direction: np.ndarray) -> None:
    """Compare what was added after the layer with the direction, and see that the layer before is as it was."""
    added = after(model, LAYER) - plain
    torch.testing.assert_close(added, torch.from_numpy(direction).float().expand_as(added), rtol=0, atol=1e-5)


def test_steering_vectors_adds_the_direction(model: Any, direction: np.ndarray) -> None:
    """After the layer of our number, to every token."""
    reader("steering_vectors")
    plain, before = after(model, LAYER), after(model, LAYER - 1)
    with steering_vector({LAYER: direction}).apply(model):
        check(model, plain, direction)
        assert torch.equal(after(model, LAYER - 1), before)


def test_repeng_adds_the_direction(model: Any, direction: np.ndarray) -> None:
    """After the layer of our number, to every token."""
    reader("repeng")
    from repeng import ControlModel

    plain = after(model, LAYER)
    controlled = ControlModel(model, [LAYER])
    try:
        controlled.set_control(control_vector("llama", {LAYER: direction}), 1.0)
        check(model, plain, direction)
    finally:
        controlled.unwrap()


def test_toploc_verifies_another_run() -> None:
    """Proofs hold for the states of a second capture, and not for those of other prompts."""
    toploc = reader("toploc")
    sample, again, other = made(width=256)[0], made(width=256)[0], made(width=256)[1]
    proofs = toploc_proofs(sample, decode_batching_size=4, topk=16)
    results = toploc.verify_proofs_bytes(toploc_activations(again), proofs, 4, 16)
    assert len(results) == len(proofs) > 1
    assert all(result.exp_intersections == 16 and result.mant_err_mean == 0 for result in results)
    wrong = toploc.verify_proofs_bytes(toploc_activations(other), proofs[:1], 4, 16)
    assert wrong[0].exp_intersections < 16
