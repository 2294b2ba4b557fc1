"""New weights in a running engine: rows, and what is said of them, are those of the weights of that moment.

Runs in the test process, beside one eager engine at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm import SamplingParams

from engine.engines import Engine, References, compare, prompts
from routing import check_followed
from vllm_tap import Recording, Spec
from vllm_tap.client.collector import Collector
from vllm_tap.client.connection import connect
from vllm_tap.vllm.facts import vllm_version

pytestmark = pytest.mark.engine

BIAS = "mlp.gate.e_score_correction_bias"


def changed(folder: Path, target: Path) -> Path:
    """Write a copy of a model with other weights."""
    shutil.copytree(folder, target)
    generator = torch.Generator().manual_seed(5)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        by = 1.0 if name.endswith(BIAS) else 0.3 * float(weight.std().nan_to_num(0.0))
        weights[name] = weight + torch.randn(weight.shape, generator=generator) * by
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


def biases(folder: Path) -> dict[int, tuple[float, ...]]:
    """Return the biases of a model's files, by layer."""
    weights = load_file(folder / "model.safetensors")
    return {int(name.split(".")[2]): tuple(bias.tolist()) for name, bias in weights.items() if name.endswith(BIAS)}


def reload(engine: Engine, folder: Path) -> None:
    """Put the weights of a folder into a running engine."""
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    engine.llm.reset_prefix_cache()


def test_rows_are_those_of_the_weights_of_that_moment(tiny_model: Callable[..., Path], tmp_path: Path):
    """There and back."""
    first = tiny_model("llama")
    second = changed(first, tmp_path / "second")
    engine = Engine(first, enforce_eager=True)
    known = {folder: References(folder) for folder in (first, second)}
    spec = Spec(hidden_states="all", embeddings=True, final_hidden_states=True)
    compare(engine.capture(prompts(), spec), known[first])
    for folder in (second, first):
        reload(engine, folder)
        compare(engine.capture(prompts(), spec), known[folder])
    engine.close()


@pytest.fixture(scope="module")
def moe(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An eager engine of a model with experts and a bias."""
    engine = Engine(tiny_model("glm4_moe"), enforce_eager=True)
    reason = connect(engine.llm).why_not("expert_ids")
    if reason and tuple(map(int, vllm_version().split(".")[:2])) < (0, 30):
        engine.close()
        pytest.skip(reason)
    yield engine
    engine.close()


def test_what_is_said_of_a_router_is_what_the_rows_confirm(moe, tiny_model, tmp_path):
    """The bias is that of the moment, and experts follow from it.

    The experts' own weights are not compared: vLLM 0.32 on a processor does not reload packed ones, also without taps.
    """
    first = tiny_model("glm4_moe")
    second = changed(first, tmp_path / "second")
    experts = Spec(router_logits="all", routed_experts="all")
    before = moe.capture(prompts(), experts)
    for folder in (second, first, second):
        reload(moe, folder)
        result = moe.capture(prompts(), experts)
        assert {layer: routing.bias for layer, routing in result.routing.items()} == biases(folder)
        assert all(routing.checked for routing in result.routing.values())
        check_followed(result)
        assert ", plus a bias" in result.conventions["expert_ids"]
    assert {layer: routing.bias for layer, routing in before.routing.items()} == biases(first), "a result is no view"


def test_a_capture_without_experts_says_the_bias_and_does_not_call_it_confirmed(moe, tiny_model, tmp_path):
    """Until one that has the rows."""
    second = changed(tiny_model("glm4_moe"), tmp_path / "second")
    for folder in (tiny_model("glm4_moe"), second):
        reload(moe, folder)
        moe.capture(prompts(), Spec(router_logits="all", routed_experts="all"))
    reload(moe, tiny_model("glm4_moe"))
    result = moe.capture(prompts(), Spec(hidden_states=[0]))
    assert {layer: routing.bias for layer, routing in result.routing.items()} == biases(tiny_model("glm4_moe"))
    assert not any(routing.checked for routing in result.routing.values())
    result = moe.capture(prompts(), Spec(router_logits="all", routed_experts="all"))
    assert all(routing.checked for routing in result.routing.values())


def test_a_capture_that_waits_for_requests_has_the_bias_of_the_next_ones(moe, tiny_model, tmp_path):
    """As a server's does, which stays for a while after its last request. Plain requests run meanwhile."""
    first = tiny_model("glm4_moe")
    second = changed(first, tmp_path / "second")
    reload(moe, first)
    with Recording(moe.llm, Spec(router_logits="all", routed_experts="all")) as recording:
        collector = Collector(recording)
        for sample, folder in enumerate((first, second, first)):
            if sample:
                reload(moe, folder)
            moe.llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(max_tokens=1), use_tqdm=False)
            params = recording.mark(SamplingParams(max_tokens=3, temperature=0.0), sample)
            (output,) = moe.llm.generate([{"prompt_token_ids": [7, 8, 9]}], params, use_tqdm=False)
            moe.llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(max_tokens=1), use_tqdm=False)
            collector.take()
            result = collector.result(sample, output)
            assert {layer: routing.bias for layer, routing in result.routing.items()} == biases(folder)
            check_followed(result)
