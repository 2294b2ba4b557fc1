"""What users do with a result and with marks, and what they forget, on one eager Llama; against Hugging Face.

Runs in the test process, beside the engine, which the last test ends.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vllm_tap
from engine.engines import DEADLINE_S, TRANSPORTS, Engine, References, Shelf, compare, greedy, prompts
from vllm_tap import EngineDiedError, PositionError, Recording, RowsMissingError, Spec, SpecError

pytestmark = pytest.mark.engine

HIDDEN = Spec(hidden_states="all")


@pytest.fixture(scope="module")
def shelf(tiny_model: Callable[..., Path]) -> Iterator[Shelf]:
    """The engine of this module."""
    shelf = Shelf(lambda: Engine(tiny_model("llama"), enforce_eager=True, listens=True))
    yield shelf
    shelf.close()


@pytest.fixture
def engine(shelf: Shelf) -> Engine:
    """A running engine."""
    return shelf.get()


@pytest.fixture
def known(references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references("llama")


WRITES: dict[str, Callable[[Any], object]] = {
    "a sample's rows": lambda result: result[1].hidden_states[2].sub_(1),
    "float32 of float32": lambda result: result[0].hidden_states[1].float().numpy().__isub__(1),
    "all rows": lambda result: result.rows("hidden_states", 3).zero_(),
    "numpy": lambda result: np.asarray(result[2].hidden_states[0]).__setitem__(0, 7),
    "Hugging Face's form": lambda result: result[0].as_hf()["hidden_states"][2].mul_(2),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_rows_can_be_written_and_stay_here(engine, known, transport):
    """Centred in place, one step's rows are the user's own: captures before and after in the same memory are right."""
    spec = Spec(hidden_states="all", embeddings=True, final_hidden_states=True)
    given = prompts([9, 20, 6])  # one step: views, not gathered copies
    kept = engine.capture(given, spec, max_tokens=1, transport=transport)
    for write in WRITES.values():
        result = engine.capture(given, spec, max_tokens=1, transport=transport)
        compare(result, known)
        write(result)
        again = engine.capture(given, spec, max_tokens=1, transport=transport)
        compare(again, known)
        del result, again
    compare(kept, known)


def test_centred_rows_are_what_was_computed(engine):
    """What is written can be read again, page after page; rows beside it have not changed."""
    result = engine.capture(prompts([60]), HIDDEN, max_tokens=1)
    rows, beside = result[0].hidden_states[1], result[0].hidden_states[2]
    before, other = rows.clone(), beside.clone()
    rows -= rows.mean(0)
    assert rows.equal(before - before.mean(0))
    assert result[0].hidden_states[1].equal(rows)
    assert beside.equal(other)


def test_a_position_that_a_prompt_lacks_is_refused_before_it_runs(engine):
    """Nothing has been generated when the error comes, and nothing is under way."""
    ran: list[Any] = []
    with pytest.raises(PositionError, match="prompt 1 has 2 tokens and no position 3"), watched(engine, ran):
        engine.capture(prompts([6, 2, 5]), Spec(hidden_states=[1], positions=[3]))
    for positions in ("generated", "last_generated"):
        with pytest.raises(PositionError, match="max_tokens=1"), watched(engine, ran):
            engine.capture(prompts([6]), Spec(hidden_states=[1], positions=positions), max_tokens=1)
    assert ran == []
    assert engine.status()[0]["captures"] == []


class watched:  # noqa: N801
    """Notes the steps of an engine in a block."""

    def __init__(self, engine: Engine, ran: list[Any]) -> None:
        self._core, self._ran = engine.llm.llm_engine, ran

    def __enter__(self) -> None:
        step = self._core.step
        self._core.step = lambda: self._ran.append(1) or step()

    def __exit__(self, *_: object) -> None:
        del self._core.step


def test_rows_that_are_left_out_are_told_by_labels(engine, known):
    """With "skip" the matrix has rows of the prompts that are long enough, and its labels name them."""
    lengths = [6, 2, 5]
    for position, samples in ((3, [0, 2]), (-3, [0, 2]), (5, [0])):
        spec = Spec(hidden_states=[1], positions=[position], missing="skip")
        result = engine.capture(prompts(lengths), spec, max_tokens=1)
        compare(result, known, lambda n, _, p=position: [p % n] if -n <= p < n else [])
        labels = result.row_labels()
        assert labels.samples.tolist() == samples
        assert labels.positions.tolist() == [position % lengths[sample] for sample in samples]
        assert len(result.rows("hidden_states", 1)) == len(samples)


def test_a_completion_that_stops_at_once_leaves_the_others(engine, known):
    """The error names the prompt, and has the rows of the others."""
    given = prompts([12, 30])
    plain = engine.generate(given)
    spec = Spec(hidden_states="all", positions="generated")
    params = [greedy(), greedy(ignore_eos=False, stop_token_ids=[plain[1][0]])]
    with pytest.raises(PositionError, match=r"prompt 1, completion 0.*stopped at its first.*1 of 2") as caught:
        engine.capture(given, spec, sampling_params=params)
    assert (caught.value.sample, caught.value.completion) == (1, 0)
    compare(caught.value.result, known, lambda prompt_len, num_rows: list(range(prompt_len, num_rows)))
    assert [len(sample) for sample in caught.value.result] == [7, 0]
    assert engine.status()[0]["captures"] == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_copies_of_results_and_samples_travel(engine, known, transport):
    """Pickled and copied deeply with the outputs, they are right when the original, and its memory, are gone."""
    result = engine.capture(prompts(), Spec(hidden_states="all", embeddings=True), transport=transport)
    pickled, copied = pickle.dumps(result), copy.deepcopy(result)
    samples = pickle.dumps(list(result))
    labels = [(sample.positions, sample.token_ids) for sample in result]
    rows = [sample.hidden_states[2].clone() for sample in result]
    del result
    for again in (pickle.loads(pickled), copied):
        compare(again, known)
    for sample, (positions, token_ids), expected in zip(pickle.loads(samples), labels, rows, strict=True):
        assert sample.positions.equal(positions)
        assert sample.token_ids.equal(token_ids)
        assert sample.hidden_states[2].equal(expected)


def test_marks_are_checked_when_they_are_made(engine):
    """What the engine would refuse later, or ignore, is refused by name."""
    from vllm import PoolingParams
    from vllm.sampling_params import BeamSearchParams

    with Recording(engine.llm, HIDDEN) as recording:
        for params in (BeamSearchParams(beam_width=2, max_tokens=2), {}, {"max_tokens": 3}, None, PoolingParams()):
            with pytest.raises(SpecError, match=rf"vllm\.SamplingParams, got {type(params).__name__}"):
                recording.mark(params, 0)
            with pytest.raises(SpecError, match=rf"vllm\.SamplingParams, got {type(params).__name__}"):
                recording.mark_all([greedy(), params])
        with pytest.raises(SpecError, match=r"takes a list of parameters.*got SamplingParams"):
            recording.mark_all(greedy())
        with pytest.raises(SpecError, match="0 or more, got -1"):
            recording.mark(greedy(), -1)
    with pytest.raises(SpecError, match="this Recording has ended"):
        recording.mark(greedy(), 0)


def test_mistakes_with_marks_name_the_mark(engine, known):
    """One mark for all, none, and those of an older recording; numpy's integers are numbers of samples."""
    given = prompts([5, 12])
    spent = None
    with Recording(engine.llm, HIDDEN) as recording:
        one = recording.mark(greedy(), 0)
        with pytest.raises(RowsMissingError, match=r"sample 1, which was not marked.*marked 1 of 2.*mark\(params, 1\)"):
            recording.finish(engine.llm.generate(given, one, use_tqdm=False))
    with Recording(engine.llm, HIDDEN) as recording:
        plain = [*recording.mark_all([greedy()]), greedy()]
        with pytest.raises(RowsMissingError, match="sample 1, which was not marked"):
            recording.finish(engine.llm.generate(given, plain, use_tqdm=False))
    with Recording(engine.llm, HIDDEN) as recording:
        spent = [recording.mark(greedy(), np.int64(sample)) for sample in range(2)]
        compare(recording.finish(engine.llm.generate(given, spent, use_tqdm=False)), known)
    with Recording(engine.llm, HIDDEN) as recording:
        recording.mark_all([greedy()] * 2)
        with pytest.raises(RowsMissingError, match=r"No request came with the mark of this sample.*older Recording"):
            recording.finish(engine.llm.generate(given, spent, use_tqdm=False))
    with Recording(engine.llm, HIDDEN) as recording:
        first, _ = recording.mark_all([greedy()] * 2)
        with pytest.raises(RowsMissingError, match=r"sample 1.*never met.*More than one request.*of sample 0"):
            recording.finish(engine.llm.generate(given, [first, first], use_tqdm=False))
    compare(engine.capture(given, HIDDEN), known)


def test_shutdown_ends_the_engine_now(engine, known):
    """Its processes are gone though somebody still holds the object; rows can be read, and a capture says what is."""
    result = engine.capture(prompts(), HIDDEN)
    vllm_tap.shutdown(engine.llm)
    assert engine.is_gone(DEADLINE_S)
    compare(result, known)
    with pytest.raises(EngineDiedError, match="new LLM"):
        engine.capture(prompts(), HIDDEN)
    vllm_tap.shutdown(engine.llm)
    with pytest.raises(SpecError, match=r"expected a vllm\.LLM, got str"):
        vllm_tap.shutdown("model")
    assert isinstance(result[0].hidden_states[0], torch.Tensor)
