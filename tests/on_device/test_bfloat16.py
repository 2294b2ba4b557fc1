"""Rows of bfloat16 engines against Hugging Face in bfloat16 and in float32, on the same device.

Runs in the test process, beside one engine at a time; its mode is that of `device`. Two kernels that round to bfloat16
at different places agree to no fixed digit. So Hugging Face's own distance from float32 is the measure: a captured row
may be as far from it, times FACTOR. And a row of another position or layer is nearer to another exact row than to its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import device
from engine.engines import Engine, expected_rows, prompts, rows_of, sequence
from reference import ReferenceModel
from vllm_tap import Spec

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

FACTOR = 2.0
EVERYTHING: dict[str, Any] = {"hidden_states": "all", "embeddings": True, "final_hidden_states": True}
FLIPPED = 0.2
"""Most rows of a mixture of experts that may lie nearer to another row: rounding chooses other experts for some."""


class Running(NamedTuple):
    """An engine and its model in both precisions."""

    engine: Engine
    spec: Spec
    exact: ReferenceModel
    rounded: ReferenceModel
    has_experts: bool


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "gemma3"])
def running(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[Running]:
    """A model in bfloat16, compiled on a GPU."""
    folder, has_experts = tiny_model(request.param, "bfloat16"), request.param == "qwen3_moe"
    exact, rounded = ReferenceModel(folder), ReferenceModel(folder, torch.bfloat16)
    engine = Engine(folder, dtype="bfloat16", enforce_eager=True)
    streams = EVERYTHING | ({"router_logits": "all"} if has_experts else {})
    yield Running(engine, Spec(**streams), exact, rounded, has_experts)
    engine.close()


def distances(rows: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return how far each row is off, root mean square, of the scale of all."""
    return (rows.float() - exact).square().mean(-1).sqrt() / exact.square().mean().sqrt()


def test_rows_are_as_near_to_float32_as_those_of_hugging_face(running: Running) -> None:
    """The median row of every stream and layer, and each row by its neighbours: also of prompts cut into chunks."""
    result = running.engine.capture(prompts(), running.spec)
    ours: dict[tuple[str, int], list[torch.Tensor]] = {}
    theirs: dict[tuple[str, int], list[torch.Tensor]] = {}
    strayed = {"rows": 0, "all": 0}
    for index, output in enumerate(result.outputs):
        tokens, sample = sequence(output), result.sample(index)
        exact, rounded = running.exact.run(tokens), running.rounded.run(tokens)
        for stream in result.layers:
            for layer in result.layers[stream]:
                rows, at = rows_of(sample, stream, layer), expected_rows(exact, stream, layer)
                assert rows.shape == at.shape
                if stream != "router_logits":
                    assert rows.dtype == torch.bfloat16
                    nearest = torch.cdist(rows.float(), at).argmin(1)
                    same = (at[nearest] == at).all(1)  # tokens may repeat where no layer has told them apart
                    strayed["rows"] += int((~same).sum())
                    strayed["all"] += len(rows)
                ours.setdefault((stream, layer), []).append(distances(rows, at))
                theirs.setdefault((stream, layer), []).append(distances(expected_rows(rounded, stream, layer), at))
    assert strayed["rows"] <= (FLIPPED if running.has_experts else 0) * strayed["all"], strayed
    for place, found in ours.items():
        mine, reference = torch.cat(found).median().item(), torch.cat(theirs[place]).median().item()
        assert mine <= FACTOR * reference + 1e-6, f"{place}: {mine:.3g} off, Hugging Face in bfloat16 {reference:.3g}"


def test_all_ways_give_the_same_bits(running: Running) -> None:
    """Rows in shared memory, in calls, staged, written at once: of one prompt in chunks, for the same batches."""
    one = prompts([150])
    first = running.engine.capture(one, running.spec)
    for options in ({"transport": "inline"}, {"staging": "direct"}, {"staging": "staged"}):
        if "staging" in options and not device.ON_CUDA:
            continue
        again = running.engine.capture(one, running.spec, **options)
        for stream in first.layers:
            for layer in first.layers[stream]:
                rows, others = (rows_of(result[0], stream, layer) for result in (first, again))
                assert rows.equal(others), (options, stream, layer)


def test_fewer_rows_are_those_of_the_whole(running: Running) -> None:
    """Layers and positions that are chosen have the bits that they have in a capture of everything."""
    one = prompts([150])
    whole = running.engine.capture(one, running.spec)[0]
    for positions, at in (("last", [149]), ("generated", list(range(150, 157))), ([0, 70, -1], [0, 70, 149])):
        found = running.engine.capture(one, Spec(hidden_states=[0, 3], positions=positions))[0]
        assert found.positions.tolist() == at
        for layer in (0, 3):
            assert found.hidden_states[layer].equal(whole.hidden_states[layer][at])


def test_chosen_experts_have_the_highest_scores(running: Running) -> None:
    """No expert that was not chosen has a higher logit than one that was; of equal ones either may be."""
    if not running.has_experts:
        pytest.skip("a dense model")
    from vllm_tap.client.connection import connect

    reason = connect(running.engine.llm).why_not("expert_ids")
    if reason:
        pytest.skip(reason)
    result = running.engine.capture(prompts(), Spec(router_logits="all", routed_experts="all"))
    for sample in result:
        for layer, logits in sample.router_logits.items():
            ids = sample.expert_ids[layer].long()
            lowest = logits.float().gather(1, ids).amin(1)
            assert (lowest >= logits.float().topk(ids.shape[1]).values.amin(1)).all()
            assert (ids.sort(1).values.diff(dim=1) > 0).all()
