"""A Spec for each prompt, against Hugging Face: samples have what theirs asks for, and nothing of the others.

Runs in the test process, beside one eager Llama engine.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.engines import (
    PROMPT_LENGTHS,
    TOLERANCE,
    TRANSPORTS,
    Engine,
    References,
    error,
    expected_rows,
    greedy,
    prompts,
    rows_of,
    sequence,
    wait_until,
)
from shadow import chosen
from vllm_tap import DatasetError, LayerError, PositionError, Positions, Spec, SpecError, Tap, open_dataset
from vllm_tap.spec import wanted_tokens

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

SPECS = [
    Spec(hidden_states=[1], positions="last"),
    Spec(hidden_states=[0, 3], embeddings=True),
    Spec(hidden_states=[1], positions=Positions.prompt(-4) | Positions.generated(step=3)),
    Spec(final_hidden_states=True, positions="generated"),
    Spec(hidden_states=[1], positions=[0, -1]),
]
EACH = [spec for spec, _ in zip(itertools.cycle(SPECS), PROMPT_LENGTHS, strict=False)]


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """Llama, eager."""
    engine = Engine(tiny_model("llama"), enforce_eager=True, listens=True)
    yield engine
    engine.close()


@pytest.fixture
def known(references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references("llama")


def wanted(spec: Spec, output: Any, completion: int = 0) -> list[int]:
    """Return the positions that a Spec asks for, of a sequence alone."""
    tokens = np.array(sequence(output, completion))
    num_prompt = len(output.prompt_token_ids)
    if isinstance(spec.positions, Positions):
        return chosen(spec.positions, num_prompt, tokens.tolist())
    starts = np.array([0, len(tokens)])
    return wanted_tokens(spec.positions, np.array([num_prompt]), starts, np.array([0])).tolist()


def places(spec: Spec) -> dict[str, list[int]]:
    """Return the streams and layers that a Spec of these tests asks for."""
    found = {"hidden_states": list(spec.hidden_states or ())}
    found |= {"embeddings": [0] if spec.embeddings else [], "final_hidden_states": [-1] * spec.final_hidden_states}
    return {name: layers for name, layers in found.items() if layers}


def compare_sample(sample: Any, spec: Spec, known: References) -> None:
    """Compare the rows of a sample in all places of its Spec, and see that it has no others."""
    tokens = sequence(sample.output, sample.completion)
    at = wanted(spec, sample.output, sample.completion)
    assert sample.spec == spec
    assert sample.positions.tolist() == at
    assert sample.token_ids.tolist() == [tokens[position] for position in at]
    for stream, layers in places(spec).items():
        for layer in layers:
            whole = expected_rows(known.of(tokens), stream, layer)
            assert error(rows_of(sample, stream, layer), whole[at], whole.square().mean().sqrt()) < TOLERANCE
    if spec.hidden_states:
        with pytest.raises(LayerError, match=r"layer 2 was not captured: hidden_states of .*Spec\("):
            sample.hidden_states[2]
        assert list(sample.hidden_states) == list(spec.hidden_states)
    else:
        with pytest.raises(SpecError, match=r"hidden_states was not captured: samples with Spec\(final"):
            _ = sample.hidden_states


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_each_sample_has_what_its_own_spec_asks_for(engine, known, transport):
    """Requests with five Specs in the same steps, some in chunks, two completions each."""
    params = greedy(n=2, temperature=1.0)
    result = engine.capture(prompts(), EACH, sampling_params=params, transport=transport)
    assert len(result) == len(EACH)
    for index, completion in itertools.product(range(len(EACH)), range(2)):
        compare_sample(result.sample(index, completion), EACH[index], known)
    assert result[-1].index == len(EACH) - 1
    assert result.layers == {"hidden_states": [0, 1, 3], "embeddings": [0], "final_hidden_states": [3]}
    rows, labels = result.rows("hidden_states", 1), result.row_labels(stream="hidden_states", layer=1)
    mine = [n for n, spec in enumerate(EACH) if spec.hidden_states == (1,)]
    assert rows.equal(torch.cat([result.sample(n, c).hidden_states[1] for n in mine for c in range(2)]))
    assert sorted(set(labels.samples.tolist())) == mine
    assert len(labels.positions) == len(rows)
    copy = pickle.loads(pickle.dumps(result))
    assert copy.rows("hidden_states", 1).equal(rows)
    with pytest.raises(DatasetError, match="a dataset has one"):
        result.save("nowhere")
    assert [state["captures"] for state in engine.status()] == [[]]


def test_rows_of_a_layer_of_several_specs_come_in_the_order_of_the_samples(engine):
    """Where samples with other streams or layers have it as well."""
    specs = [Spec(hidden_states=[1, 2]), Spec(hidden_states=[1], positions="last"), Spec(hidden_states=[1, 2])]
    result = engine.capture(prompts([4, 3, 5]), specs)
    assert result.rows("hidden_states", 1).equal(torch.cat([sample.hidden_states[1] for sample in result]))
    labels = result.row_labels(stream="hidden_states", layer=-3)
    assert labels.positions.tolist() == [p for sample in result for p in sample.positions.tolist()]
    assert result.num_rows == len(labels.samples) == sum(map(len, result))
    with pytest.raises(SpecError, match="row_labels\\(stream"):
        result.row_labels()
    with pytest.raises(LayerError, match=r"layer 3 was not captured.*\[1, 2, 3\]"):
        result.rows("hidden_states", 3)


def test_specs_that_differ_in_positions_alone_make_one_result(engine, known):
    """Their rows lie in one capture; as Hugging Face returns them only where all positions were asked for."""
    specs = [Spec(hidden_states="all", embeddings=True, final_hidden_states=True, positions=p) for p in ("last", "all")]
    result = engine.capture(prompts([4, 9]), specs)
    assert [sample.spec for sample in result] == specs
    assert [sample.positions.tolist() for sample in result] == [[3], list(range(16))]
    assert result[1].as_hf().hidden_states[1].shape[:2] == (1, 16)
    with pytest.raises(SpecError, match="positions='last'"):
        result[0].as_hf()
    with pytest.raises(DatasetError, match="different Specs"):
        result.save("nowhere")


def test_a_stream_takes_a_spec_for_each_prompt(engine, known):
    """Samples as they end, and rows as they come."""
    arguments = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}
    seen = set()
    for sample in Tap(engine.llm).stream(iter(prompts()), EACH, **arguments):
        compare_sample(sample, EACH[sample.index], known)
        seen.add(sample.index)
    assert seen == set(range(len(EACH)))
    found: dict[int, list[int]] = {n: [] for n in seen}
    for block in Tap(engine.llm).stream_rows(prompts(), EACH, **arguments):
        assert block.spec == EACH[block.index]
        found[block.index] += block.positions.tolist()
        if block.finished:
            assert found[block.index] == wanted(block.spec, block.output)


def test_a_list_that_does_not_fit_is_refused(engine):
    """Before anything runs where the prompts are known; a position that a prompt lacks is named by its own Spec."""
    with pytest.raises(SpecError, match="2 Specs for 8 prompts"):
        engine.capture(prompts(), SPECS[:2])
    with pytest.raises(SpecError, match="spec 1 of the list is a str"):
        engine.capture(prompts(), [SPECS[0], "last"])
    with pytest.raises(SpecError, match="list of Specs is empty"):
        engine.capture(prompts(), [])
    with pytest.raises(LayerError, match="no layer 9"):
        engine.capture(prompts([3, 4]), [SPECS[0], Spec(hidden_states=[9])])
    with pytest.raises(PositionError, match="prompt 1 has 4 tokens and no position 4"):
        engine.capture(prompts([3, 4]), [SPECS[0], Spec(hidden_states=[1], positions=[4])])
    for specs, says in ((SPECS[:1], "sample 1 has no Spec"), (SPECS[:3], "3 Specs for 2 prompts")):
        with pytest.raises(SpecError, match=says):
            list(Tap(engine.llm).stream(prompts([3, 4]), specs, max_tokens=2))
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert [state["captures"] for state in engine.status()] == [[]]


def test_foreign_rows_are_not_in_a_samples_memory(engine):
    """The rows of a sample's own layer, in a result of several, hold no position of another sample."""
    specs = [Spec(hidden_states=[1]), Spec(hidden_states=[1, 2]), Spec(hidden_states=[2])]
    result = engine.capture(prompts([6, 7, 8]), specs)
    other = {row.numpy().tobytes() for n in (1, 2) for row in result[n].hidden_states[2]}
    mine = result[0].hidden_states[1]
    assert not other & {row.numpy().tobytes() for row in mine}
    alone = pickle.loads(pickle.dumps(result[0]))
    assert alone.hidden_states[1].equal(mine)
    assert alone.spec == specs[0]
    assert len(pickle.dumps(result[0])) < len(pickle.dumps(result))


def test_one_row_for_each_sample_is_made_of_all_its_rows(engine, tmp_path):
    """Beside a capture of everything in the same batch; streamed, stored and copied it is the same."""
    whole = Spec(hidden_states=[1, 2])
    how = {"mean": "float32", "max": None, "sum": "float16", "last": None}
    window = Positions.prompt(-6) | Positions.generated(step=2)
    specs = [Spec(hidden_states=[2], positions=window, reduce=name, dtype=dtype) for name, dtype in how.items()]
    (given,) = prompts([70])
    result = engine.capture([given] * 5, [whole, *specs])
    chosen = torch.tensor(wanted(specs[0], result.outputs[0]))
    for sample, (name, dtype) in zip(result[1:], how.items(), strict=True):
        assert sample.output.outputs[0].token_ids == result.outputs[0].outputs[0].token_ids
        assert sample.positions.tolist() == [int(chosen[-1])]
        rows = result[0].hidden_states[2][chosen]
        expected = {"mean": rows.mean(0), "max": rows.amax(0), "sum": rows.sum(0), "last": rows[-1]}[name]
        # Requests of one batch: products may be added up in another order for each of its rows.
        found = sample.hidden_states[2]
        assert found.dtype == getattr(torch, dtype or "float32")
        torch.testing.assert_close(found[0].float(), expected, rtol=2e-3 if dtype == "float16" else 1e-4, atol=1e-2)
        assert pickle.loads(pickle.dumps(sample)).hidden_states[2].equal(found)
        with pytest.raises(SpecError, match="leave reduce out"):
            sample.as_hf()
    with pytest.raises(SpecError, match="as they come, not their max"):
        Tap(engine.llm).stream_rows([given], specs[1])
    del result, sample
    wait_until(lambda: not engine.used_bytes(), "the end of the last lease")
    alone = engine.capture(prompts(), specs[0])
    wait_until(lambda: not engine.used_bytes(), "the end of a lease of rows that have been reduced")
    alone.save(tmp_path / "run")
    dataset = open_dataset(tmp_path / "run")
    assert dataset.spec == dataset[0].spec == specs[0]
    for sample, stored in zip(alone, dataset, strict=True):
        assert stored.hidden_states[2].equal(sample.hidden_states[2])
        assert stored.positions.equal(sample.positions)
    for sample in Tap(engine.llm).stream(prompts(), specs[0], max_tokens=8, temperature=0.0, ignore_eos=True):
        torch.testing.assert_close(sample.hidden_states[2], alone[sample.index].hidden_states[2], rtol=1e-3, atol=1e-4)
