"""The old interface on engines: the founding document's example, splitting, selects, worker calls, embedding.

Runs in the test process, beside one engine at a time: Qwen3-MoE over two ranks, then Llama as an embedding model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import easysteer.hidden_states as hs
from device import num_ranks
from engine.engines import TOLERANCE, Engine, References, error, prompts, sequence, surroundings
from vllm_tap import Spec
from vllm_tap.errors import CaptureError, LayerError, SpecError

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

NUM_RANKS = num_ranks()
STREAMS = {"hidden_states": "hidden_states", "router_logits": "moe_router_logits"}
TEXTS = ["Bees dance", {"prompt": "The sea is"}, "a", {"prompt_token_ids": list(range(150))}]
SAMPLING = {"max_tokens": 6, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """Qwen3-MoE, compiled as by default, on two ranks; on one where there is a single GPU."""
    with surroundings({"VLLM_CPU_OMP_THREADS_BIND": "0|1"}):
        engine = Engine(tiny_model("qwen3_moe"), tensor_parallel_size=NUM_RANKS)
    yield engine
    engine.close()


@pytest.fixture
def known(references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references("qwen3_moe")


def expected(known: References, stream: str, tokens: Sequence[int]) -> dict[int, torch.Tensor]:
    """Return Hugging Face's rows of all layers."""
    reference = known.of(tokens)
    return reference.router_logits if stream == "router_logits" else dict(enumerate(reference.hidden_states))


def check(rows: dict[int, torch.Tensor], known: References, stream: str, tokens: Sequence[int], at: Any = ...) -> None:
    """Compare the rows of one sample, all layers, with Hugging Face's at some positions."""
    whole = expected(known, stream, tokens)
    assert sorted(rows) == sorted(whole) == [0, 1, 2, 3]
    for layer, found in rows.items():
        assert error(found, whole[layer][at], whole[layer].square().mean().sqrt()) < TOLERANCE


def test_the_documents_example(engine, known):
    """The call of the founding document returns the logits of every token, in order, by the numbers of the layers."""
    llm = engine.llm
    router_logits, outputs = hs.get_moe_router_logits_generate(llm, prompts=["Long sequence..."], max_tokens=100)
    assert type(router_logits) is dict
    check(router_logits, known, "router_logits", sequence(outputs[0]))
    assert len(sequence(outputs[0])) > 16
    usage = hs.analyze_expert_usage(router_logits, top_k=2, normalize=True)
    # Counts over tokens, divided in float32: the sum is off by a few roundings (6e-8), 1e-6 of it is allowed.
    assert sum(usage["expert_usage_counts"][3]) == pytest.approx(2)


@pytest.mark.parametrize("as_class", [False, True])
def test_hidden_states_split_and_not(engine, known, as_class):
    """Samples are lists of layers with the rows of their own tokens; not split, layers hold sample after sample."""
    owner = hs.HiddenStatesCaptureGenerate() if as_class else hs
    split, outputs = owner.get_all_hidden_states_generate(engine.llm, TEXTS, **SAMPLING)
    for sample, output in zip(split, outputs, strict=True):
        assert len(output.outputs[0].token_ids) == 6
        assert type(sample) is list
        check(dict(enumerate(sample)), known, "hidden_states", sequence(output))
    flat, again = owner.get_all_hidden_states_generate(engine.llm, TEXTS, split_by_samples=False, **SAMPLING)
    assert type(flat) is list
    tokens = [sequence(output) for output in again]
    for layer, rows in enumerate(flat):
        for part, ids in zip(rows.split([len(ids) for ids in tokens]), tokens, strict=True):
            whole = expected(known, "hidden_states", ids)[layer]
            assert error(part, whole, whole.square().mean().sqrt()) < TOLERANCE


@pytest.mark.parametrize("as_class", [False, True])
def test_router_logits_split_and_not(engine, known, as_class):
    """Not split is the default: a dict by layer, sample after sample; split, a list of such dicts."""
    call = (
        hs.MoERouterLogitsCaptureGenerate().get_router_logits_generate
        if as_class
        else (hs.get_moe_router_logits_generate)
    )
    split, outputs = call(engine.llm, TEXTS, split_by_samples=True, **SAMPLING)
    for sample, output in zip(split, outputs, strict=True):
        check(sample, known, "router_logits", sequence(output))
    flat, _ = call(engine.llm, TEXTS, **SAMPLING)
    for layer, rows in flat.items():
        assert len(rows) == sum(len(sample[layer]) for sample in split)


def test_sampling_fields_reach_the_engine(engine):
    """max_tokens is 1 by default; other fields go through, wrong ones and several completions are refused."""
    states, outputs = hs.get_all_hidden_states_generate(engine.llm, "abc")
    assert [len(outputs[0].outputs[0].token_ids), len(states), states[0][0].shape] == [1, 1, (3, 128)]
    _, outputs = hs.get_all_hidden_states_generate(engine.llm, ["abc"], max_tokens=9, min_tokens=9, temperature=0.7)
    assert len(outputs[0].outputs[0].token_ids) == 9
    with pytest.raises(SpecError, match="Did you mean 'temperature'"):
        hs.get_all_hidden_states_generate(engine.llm, ["abc"], temprature=0.5)
    with pytest.raises(SpecError, match="one sequence"):
        hs.get_moe_router_logits_generate(engine.llm, ["abc"], n=2)
    with pytest.raises(SpecError, match="ends in _generate"):
        hs.get_all_hidden_states(engine.llm, ["abc"])


# Clause, and which of a sequence's positions it stands for: (length of the prompt, tokens) to positions.
SELECTS: list[tuple[Any, Callable[[int, list[int]], list[int]]]] = [
    (None, lambda prompt, tokens: list(range(len(tokens)))),
    ({"prompt_positions": [-1]}, lambda prompt, tokens: [prompt - 1]),
    ({"generation": "all"}, lambda prompt, tokens: list(range(prompt, len(tokens)))),
    (
        {"prompt": "all", "exclude_prompt_positions": [0], "generation_window": (1, 3)},
        lambda prompt, tokens: [*range(1, prompt), prompt + 1, prompt + 2],
    ),
    (
        {"prompt_tokens": [ord("a")], "prompt_window": (-2, None)},
        lambda prompt, tokens: [p for p in range(prompt) if p >= prompt - 2 or tokens[p] == ord("a")],
    ),
]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("number", range(len(SELECTS)))
def test_captures_with_selects(engine, known, stream, number):
    """A clause keeps the rows that it names, labelled, in every sample and layer."""
    clause, positions = SELECTS[number]
    result = hs.capture(engine.llm, TEXTS, select=clause, stream=stream, **SAMPLING)
    assert (len(result), result.layer_ids, result.labelled) == (4, [0, 1, 2, 3], True)
    total = 0
    for index, output in enumerate(result.outputs):
        tokens = sequence(output)
        at = positions(len(output.prompt_token_ids), tokens)
        assert result.sample_positions(index) == at
        assert result.sample_token_ids(index) == [tokens[position] for position in at]
        check(result.sample(index), known, stream, tokens, at)
        meta = result.meta(2)
        assert meta.req_ids[total : total + len(at)] == [output.request_id] * len(at)
        assert meta.positions[total : total + len(at)].tolist() == at
        total += len(at)
    assert {layer: len(rows) for layer, rows in result.layers.items()} == dict.fromkeys(range(4), total)
    assert [[len(rows) for rows in sample] for sample in result.to_nested()] == [
        [len(result.sample_positions(index))] * 4 for index in range(4)
    ]


def test_a_capture_of_some_layers_in_another_dtype_with_a_clause_for_each_prompt(engine, known):
    """Layers are named from either end; a prompt's own clause takes the place of the common one."""
    result = hs.capture(
        engine.llm,
        ["Bees dance", "The sea is"],
        layers=[1, -1],
        dtype="float16",
        select={"prompt_positions": [0]},
        per_prompt_selects=[None, {"prompt_window": (1, 3)}],
    )
    assert result.layer_ids == [1, 3]
    assert [result.sample_positions(index) for index in range(2)] == [[0], [1, 2]]
    whole = known.of(sequence(result.outputs[1])).hidden_states[3]
    assert result.rows(3).dtype == torch.float16
    # float16 rounds by 2 ** -11, 4.9e-4 of a value; what float32 differs by before that is a hundredth of it.
    torch.testing.assert_close(result.sample(1)[3].float(), whole[1:3], rtol=1e-3, atol=TOLERANCE)
    with pytest.raises(LayerError, match=r"layers \[1, 3\]"):
        result.rows(2)
    with pytest.raises(SpecError, match="1 per_prompt_selects for 2 prompts"):
        hs.capture(engine.llm, ["a", "b"], per_prompt_selects=[None])


def rpc(engine: Engine, name: str) -> list[Any]:
    """Make a worker call as old code did."""
    return engine.llm.llm_engine.engine_core.collective_rpc(name)


@pytest.fixture
def calls(engine: Engine) -> Iterator[Callable[[str], list[Any]]]:
    """A function that makes worker calls; afterwards nothing is enabled or kept."""
    yield lambda name: rpc(engine, name)
    for stream in STREAMS.values():
        rpc(engine, f"disable_{stream}_capture")
        rpc(engine, f"clear_{stream}")


def get(calls: Callable[[str], list[Any]], stream: str) -> dict[int, torch.Tensor]:
    """Return the rows of the first worker; the others have none."""
    from vllm.hidden_states import deserialize_hidden_states, deserialize_moe_router_logits

    reader, name = {
        "hidden_states": (deserialize_hidden_states, "get_captured_hidden_states"),
        "router_logits": (deserialize_moe_router_logits, "get_moe_router_logits"),
    }[stream]
    first, *others = calls(name)
    assert not any(others)
    return reader(first)


def test_worker_calls_take_all_requests_in_order(engine, known, calls):
    """While enabled every request's rows are taken, whatever shares a step; they come request after request."""
    assert calls("enable_hidden_states_capture") == calls("enable_moe_router_logits_capture") == [None] * NUM_RANKS
    given = prompts()
    made = engine.generate(given)
    info = calls("get_hidden_states_debug_info")[0]
    assert (info["capture_enabled"], info["num_layers"], info["num_requests"]) == (True, 4, len(given))
    tokens = [[*prompt["prompt_token_ids"], *ids[:-1]] for prompt, ids in zip(given, made, strict=True)]
    for stream in STREAMS:
        taken = get(calls, stream)
        cut = {layer: rows.split([len(ids) for ids in tokens]) for layer, rows in taken.items()}
        for number, ids in enumerate(tokens):
            check({layer: parts[number] for layer, parts in cut.items()}, known, stream, ids)


def test_worker_calls_keep_what_was_taken_until_it_is_cleared(engine, known, calls):
    """Rows stay after a get and after disabling, rows while disabled are not taken, and clearing frees one stream."""
    calls("enable_moe_router_logits_capture")
    first, _ = sequence_of(engine, "Bees")
    calls("enable_hidden_states_capture")
    second, _ = sequence_of(engine, "dance")
    check(get(calls, "hidden_states"), known, "hidden_states", second)
    calls("disable_moe_router_logits_capture")
    sequence_of(engine, "unseen")
    logits = get(calls, "router_logits")
    for part, ids in ((slice(0, len(first)), first), (slice(len(first), None), second)):
        check({layer: rows[part] for layer, rows in logits.items()}, known, "router_logits", ids)
    calls("clear_moe_router_logits")
    assert calls("get_moe_router_logits") == [{}] * NUM_RANKS
    assert len(get(calls, "hidden_states")[0]) > len(second)
    assert calls("get_moe_debug_info")[0]["num_rows"] == 0


def sequence_of(engine: Engine, text: str) -> tuple[list[int], Any]:
    """Generate a few tokens; return what went through the model, and the output."""
    from engine.engines import greedy

    (output,) = engine.llm.generate([text], greedy(max_tokens=3), use_tqdm=False)
    return sequence(output), output


def test_worker_calls_and_captures_go_on_beside_each_other(engine, calls):
    """Worker calls take the rows of a capture's requests, too; both have the same."""
    calls("enable_hidden_states_capture")
    result = engine.capture(prompts([3]), Spec(hidden_states=[0]))
    taken = get(calls, "hidden_states")[0]
    calls("disable_hidden_states_capture")
    assert torch.equal(taken, result[0].hidden_states[0])


def test_rows_from_the_prefix_cache_are_an_error_of_worker_calls(engine, calls):
    """A request that read the prefix cache has no rows for what it read: that is said, never passed over."""
    given = prompts([200], seed=5)
    engine.generate(given)
    calls("enable_hidden_states_capture")
    engine.generate(given)
    with pytest.raises(CaptureError, match=r"no rows for positions 0 to \d+.*enable_prefix_caching=False"):
        get(calls, "hidden_states")
    calls("clear_hidden_states")
    assert get(calls, "hidden_states") == {}


@pytest.fixture(scope="module")
def llama(engine: Engine, tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An embedding engine without experts, once the other one has ended."""
    engine.close()
    llama = Engine(tiny_model("llama"), runner="pooling", convert="embed", enforce_eager=True)
    yield llama
    llama.close()


@pytest.mark.parametrize("as_class", [False, True])
def test_hidden_states_of_texts(llama, references, as_class):
    """Texts give the rows of their tokens and the outputs of `llm.embed`, split and not."""
    owner = hs.HiddenStatesCaptureV1() if as_class else hs
    texts = ["Bees dance", "a" * 130, "b"]
    split, outputs = owner.get_all_hidden_states(llama.llm, texts)
    flat, _ = owner.get_all_hidden_states(llama.llm, texts, split_by_samples=False)
    plain = llama.llm.embed(texts, use_tqdm=False)
    for number, output in enumerate(outputs):
        assert type(output) is type(plain[number])
        # The two batches are added up in different orders; an embedding has length one.
        assert output.outputs.embedding == pytest.approx(plain[number].outputs.embedding, abs=TOLERANCE)
        rows = dict(enumerate(split[number]))
        check(rows, references("llama"), "hidden_states", output.prompt_token_ids)
    assert [rows.shape for rows in flat] == [(10 + 130 + 1, 128)] * 4


def test_a_dense_model_has_no_router_logits(llama):
    """A model without experts gives an empty dict, one a text if split, and all outputs."""
    logits, outputs = hs.get_moe_router_logits(llama.llm, ["a", "b"])
    assert (logits, len(outputs)) == ({}, 2)
    split, _ = hs.MoERouterLogitsCaptureV1().get_router_logits(llama.llm, ["a", "b"], split_by_samples=True)
    assert split == [{}, {}]
    with pytest.raises(SpecError, match="without _generate"):
        hs.get_moe_router_logits_generate(llama.llm, ["a"])
