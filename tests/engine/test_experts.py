"""Router logits, expert ids and expert weights against Hugging Face, and against what is said of the router.

Eager Qwen3-MoE and GLM-4 (sigmoid, groups, a bias); VLLM_TAP_TEST_MATRIX=full adds Mixtral and OLMoE (no sum over the
chosen).

Runs in the test process, beside one engine at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vllm_tap
from engine.engines import (
    FULL_MATRIX,
    TOLERANCE,
    Engine,
    References,
    compare,
    compare_with_outputs,
    prompts,
    sequence,
)
from models import MOE_FAMILIES
from routing import check_followed, follow, in_order
from vllm_tap import Spec
from vllm_tap.client.connection import connect
from vllm_tap.errors import LayerError
from vllm_tap.frame.routing import Routing
from vllm_tap.interchange import replay
from vllm_tap.vllm.facts import vllm_version

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

COVERING = ("qwen3_moe", "glm4_moe")
"""Families that `make test` starts."""

EXPERT_LAYERS = {"glm4_moe": [1, 2, 3]}
"""Layers with experts, where not all have them."""

STATED = {
    "qwen3_moe": "softmax, the 2 highest experts, scores of the chosen over their sum",
    "mixtral": "softmax, the 2 highest experts, scores of the chosen over their sum",
    "glm4_moe": (
        "sigmoid, plus a bias to choose by, the 2 highest of 4 groups, by their two highest experts, "
        "the 4 highest experts, scores of the chosen over their sum; what the experts return, times 2.5 "
        "(the bias is not zero)"
    ),
    "olmoe": "softmax, the 2 highest experts, scores of the chosen",
}
"""What is to be said of the router, by its configuration."""


@pytest.fixture(scope="module", params=[name for name in MOE_FAMILIES if FULL_MATRIX or name in COVERING])
def family(request: pytest.FixtureRequest) -> str:
    """A family whose layers have experts."""
    return request.param


@pytest.fixture(scope="module")
def engine(family: str, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An eager engine."""
    engine = Engine(tiny_model(family), enforce_eager=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def choice(engine: Engine) -> Spec:
    """What asks for logits and experts, where the router's choice can be seen: before vLLM 0.30 a kernel for processors
    kept it to itself."""
    reason = connect(engine.llm).why_not("expert_ids")
    if reason and tuple(map(int, vllm_version().split(".")[:2])) < (0, 30):
        pytest.skip(reason)
    return Spec(router_logits="all", routed_experts="all")


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


def test_experts_and_weights_follow_from_the_logits_as_stated(engine, choice, family):
    """Captured ids are exactly those that follow from captured logits by `Capture.routing`, weights to rounding."""
    result = engine.capture(prompts(), choice)
    num_experts = result.rows("router_logits", -1).shape[-1]
    assert sorted(result.routing) == result.layers["expert_ids"] == EXPERT_LAYERS.get(family, [0, 1, 2, 3])
    for layer, routing in result.routing.items():
        assert stated(routing) == STATED[family]
        assert len(routing.bias) in (0, num_experts)
        assert all(sample.expert_ids[layer].dtype == torch.uint8 for sample in result)
    check_followed(result)


def stated(routing: Routing) -> str:
    """Return a routing in words, with what it needs a bias for."""
    return f"{routing}{'' if not any(routing.bias) else ' (the bias is not zero)'}"


def test_conventions_say_how_the_router_chooses(engine, choice, family):
    """Each of the router's streams carries the statement, beside where its rows come from."""
    result = engine.capture(prompts([3]), choice)
    for stream in ("router_logits", "expert_ids", "expert_weights"):
        source, _, text = result.conventions[stream].partition("; routing: ")
        assert source
        assert text == str(result.routing[3])


def test_experts_are_those_of_hugging_face(engine, choice, known):
    """Ids are those that follow from Hugging Face's logits, but for experts closer than the tolerance."""
    result = engine.capture(prompts(), choice)
    for sample, output in zip(result, result.outputs, strict=True):
        for layer, logits in known.of(sequence(output)).router_logits.items():
            check_choice(result.routing[layer], logits, sample.expert_ids[layer], sample.expert_weights[layer])


def check_choice(routing: Routing, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
    """Check ids and weights [R, K] against logits [R, E]; a row whose experts are closer than rounding may differ."""
    found_ids, found_weights = in_order(ids, weights)
    expected_ids, expected_weights = follow(routing, logits)
    same = (found_ids == expected_ids).all(-1)
    # Logits agree to 1e-5, so only rows whose experts are that close may differ: at most one in a sample and layer.
    assert (~same).sum() <= 1
    torch.testing.assert_close(found_weights[same], expected_weights[same], rtol=0, atol=TOLERANCE)


def test_replay_records_are_the_choices_of_hugging_face(engine, choice, known, tmp_path):
    """[T, L, K] over all decoder layers against what Hugging Face's routers return, in memory and on the disk.

    The second turn of a conversation goes on where the record of the first one ends.
    """
    first = engine.capture(prompts([17]), choice)
    turn = [*first.outputs[0].prompt_token_ids, *first.outputs[0].outputs[0].token_ids, 7, 8, 9]
    second = engine.capture([{"prompt_token_ids": turn}], choice)
    start = len(first[0])
    second.save(tmp_path / "run")
    for sample in (second[0], vllm_tap.open_dataset(tmp_path / "run")[0]):
        records = [replay(first[0]), replay(sample, start=start)]
        assert [record.start for record in records] == [0, start]
        ids = np.concatenate([record.ids for record in records])
        weights = np.concatenate([record.weights for record in records])
        tokens = sequence(second.outputs[0])
        assert ids.shape[:2] == (len(tokens), 4)
        assert records[1].num_tokens == len(tokens) + 1
        check_record(ids, weights, known.choices_of(tokens), second.routing)
        for layer in second.routing:
            assert records[1].weights[:, layer].tobytes() == sample.expert_weights[layer][start:].numpy().tobytes()


def check_record(
    ids: np.ndarray, weights: np.ndarray, choices: dict[int, tuple[torch.Tensor, torch.Tensor]], routings: Any
) -> None:
    """Check ids and weights [T, L, K] against what the routers of Hugging Face's model return."""
    for layer in range(ids.shape[1]):
        if layer not in choices:
            assert not ids[:, layer].any()
            assert not weights[:, layer].any()
            continue
        scaled = torch.from_numpy(weights[:, layer]) * routings[layer].output_scale
        found_ids, found_weights = in_order(torch.from_numpy(ids[:, layer]), scaled)
        same = (found_ids == choices[layer][0]).all(-1)
        # As in `check_choice`: logits agree to 1e-5.
        assert (~same).sum() <= 1
        torch.testing.assert_close(found_weights[same], choices[layer][1][same], rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("choice")
def test_one_layer_and_position_of_each_stream(engine, known):
    """Streams of one capture may name different layers; positions are chosen for all of them."""
    result = engine.capture(prompts(), Spec(router_logits=[-1], routed_experts=[1, 3], positions="last"))
    assert result.layers == {"router_logits": [3], "expert_ids": [1, 3], "expert_weights": [1, 3]}
    for sample, output in zip(result, result.outputs, strict=True):
        reference, at = known.of(sequence(output)).router_logits, [len(output.prompt_token_ids) - 1]
        for layer in (1, 3):
            found = sample.expert_ids[layer], sample.expert_weights[layer]
            check_choice(result.routing[layer], reference[layer][at], *found)
    with pytest.raises(LayerError, match="layer 2 was not captured"):
        result[0].expert_ids[2]


@pytest.mark.usefixtures("choice")
def test_layers_without_experts_are_refused_by_number(engine, family):
    """Each layer with experts can be captured alone; the others are named, and told which have them."""
    with_experts = EXPERT_LAYERS.get(family, [0, 1, 2, 3])
    for layer in range(4):
        if layer in with_experts:
            assert engine.capture(prompts([3]), Spec(router_logits=[layer])).layers == {"router_logits": [layer]}
            continue
        for stream in ("router_logits", "routed_experts"):
            with pytest.raises(LayerError, match=f"layer {layer} has no experts.*{re.escape(str(with_experts))}"):
                engine.capture(prompts([3]), Spec(**{stream: [layer]}))
