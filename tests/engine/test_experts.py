"""Router logits, expert ids and expert weights against Hugging Face, on eager Qwen3-MoE and Mixtral.

Runs in the test process, beside one engine at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from engine.engines import TOLERANCE, Engine, References, compare, compare_with_outputs, prompts, sequence
from models import FAMILIES, MOE_FAMILIES
from vllm_tap import Spec
from vllm_tap.errors import LayerError

pytestmark = pytest.mark.engine

ROUTED = Spec(router_logits="all", routed_experts="all")


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """A family whose layers have experts."""
    return request.param


@pytest.fixture(scope="module")
def engine(family: str, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An eager engine."""
    engine = Engine(tiny_model(family), enforce_eager=True)
    yield engine
    engine.close()


@pytest.fixture
def known(family: str, references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references(family)


def test_router_logits_are_those_of_hugging_face(engine, known):
    """The logits of every token and layer are right, beside the hidden states of the same capture."""
    compare(engine.capture(prompts(), Spec(hidden_states="all", router_logits="all")), known)


def test_a_sample_reads_as_hugging_face_returns_it(engine, known):
    """`as_hf` gives the logits of `output_router_logits=True`, with and without the hidden states beside them."""
    everything = Spec(hidden_states="all", embeddings=True, final_hidden_states=True, router_logits="all")
    result = engine.capture(prompts(), everything)
    compare_with_outputs(result, known)
    assert len(result[0].as_hf().hidden_states) == 5
    alone = engine.capture(prompts([5]), Spec(router_logits="all"))[0].as_hf()
    assert alone.hidden_states is None
    assert [tuple(logits.shape) for logits in alone.router_logits] == [
        tuple(logits.shape) for logits in known.outputs_of(range(12)).router_logits
    ]


def test_experts_are_those_that_the_logits_choose(engine, family, known):
    """Ids are the K largest of Hugging Face's logits in their order, weights the softmax over the chosen ones."""
    num_chosen = FAMILIES[family]["num_experts_per_tok"]
    result = engine.capture(prompts(), ROUTED)
    for sample, output in zip(result, result.outputs, strict=True):
        reference = known.of(sequence(output)).router_logits
        for layer in range(4):
            ids, weights = sample.expert_ids[layer], sample.expert_weights[layer]
            assert ids.shape == weights.shape == (len(sample), num_chosen)
            assert ids.dtype == torch.uint8
            check_choice(reference[layer], ids.long(), weights)


def check_choice(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """Check ids and weights [R, K] against logits [R, E]; experts closer than the tolerance may change places."""
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()
    best, chosen = logits.topk(ids.shape[-1]).values, logits.gather(-1, ids)
    torch.testing.assert_close(chosen, best, rtol=0, atol=TOLERANCE * float(logits.square().mean().sqrt()))
    torch.testing.assert_close(weights, chosen.softmax(-1), rtol=0, atol=TOLERANCE)


def test_one_layer_and_position_of_each_stream(engine, known):
    """Streams of one capture may name different layers; positions are chosen for all of them."""
    result = engine.capture(prompts(), Spec(router_logits=[-1], routed_experts=[0, 2], positions="last"))
    assert result.layers == {"router_logits": [3], "expert_ids": [0, 2], "expert_weights": [0, 2]}
    for sample, output in zip(result, result.outputs, strict=True):
        reference, at = known.of(sequence(output)).router_logits, [len(output.prompt_token_ids) - 1]
        for layer in (0, 2):
            check_choice(reference[layer][at], sample.expert_ids[layer].long(), sample.expert_weights[layer])
    with pytest.raises(LayerError, match="layer 1 was not captured"):
        result[0].expert_ids[1]
