"""Samples and rows as they come, from an offline engine: equal to a capture that hands everything over at the end.

Runs in the test process, beside one eager Llama engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import vllm_tap
from engine.engines import (
    TOLERANCE,
    TRANSPORTS,
    Engine,
    Recorded,
    References,
    compare,
    error,
    expected_rows,
    greedy,
    prompts,
    rows_of,
    sequence,
    wait_until,
)
from vllm_tap import Positions, Recording, Spec, Spill, Tap
from vllm_tap.client import connection
from vllm_tap.client.collector import Collector
from vllm_tap.client.connection import connect
from vllm_tap.errors import BudgetError, PositionError, SpecError

pytestmark = pytest.mark.engine

EVERYTHING = Spec(hidden_states="all", embeddings=True, final_hidden_states=True)
GREEDY: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True}

BUDGET = 512 << 10
"""Rows of about 500 positions."""


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An engine that generates."""
    engine = Engine(tiny_model("llama"), enforce_eager=True, listens=True)
    yield engine
    engine.close()


@pytest.fixture
def no_memory(engine: Engine) -> None:
    """The memory that earlier captures left to this client for the next one is given back, by a new connection."""
    for reader in connect(engine.llm).ways.readers().values():
        reader.close()
    del connection._connections[engine.llm]
    wait_until(lambda: not engine.status()[0]["capacity_bytes"], "the end of the memory")


def assert_is_free(engine: Engine) -> None:
    """Nothing of an earlier stream is left in the engine."""
    assert not engine.llm.llm_engine.has_unfinished_requests()
    assert len(vllm_tap.capture(engine.llm, prompts((5,)), EVERYTHING, progress=False, **GREEDY)[0]) == 12


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_samples_that_come_while_others_run_are_those_of_hugging_face(
    engine: Engine, references: Callable[[str], References], transport: str
) -> None:
    """Each prompt once, with all its rows, whatever order they end in."""
    seen = []
    with Tap(engine.llm).stream(iter(prompts()), EVERYTHING, transport=transport, **GREEDY) as samples:
        for sample in samples:
            seen.append(sample.index)
            tokens = sample.output.prompt_token_ids + sample.output.outputs[0].token_ids[:-1]
            assert (
                tokens[: len(prompts()[sample.index]["prompt_token_ids"])]
                == prompts()[sample.index]["prompt_token_ids"]
            )
            assert sample.token_ids.tolist() == tokens
            for stream, layer in (("hidden_states", 0), ("hidden_states", 3), ("final_hidden_states", 3)):
                expected = expected_rows(references("llama").of(tokens), stream, layer)
                assert error(rows_of(sample, stream, layer), expected, expected.square().mean().sqrt()) < TOLERANCE
    assert sorted(seen) == list(range(len(prompts())))
    assert_is_free(engine)


def test_completions_of_a_prompt_come_one_by_one(engine: Engine) -> None:
    """With `n` above 1, each is a sample."""
    arguments = {**GREEDY, "temperature": 1.0, "n": 3}  # no seed: with chunked prompts it ends vLLM 0.32 on the CPU
    samples = list(Tap(engine.llm).stream(prompts((5, 17)), EVERYTHING, **arguments))
    assert sorted((sample.index, sample.completion) for sample in samples) == [(i, c) for i in (0, 1) for c in range(3)]
    for sample in samples:
        completion = next(c for c in sample.output.outputs if c.index == sample.completion)
        assert sample.token_ids.tolist() == sample.output.prompt_token_ids + completion.token_ids[:-1]


def test_samples_of_a_stream_make_a_dataset(
    engine: Engine, references: Callable[[str], References], tmp_path: Path
) -> None:
    """As they end, in parts; the engine's memory is given back with each."""
    with vllm_tap.DatasetWriter(tmp_path, part_bytes=100_000) as writer:
        for sample in Tap(engine.llm).stream(prompts(), EVERYTHING, **GREEDY):
            writer.add(sample, {"index": sample.index})
    dataset = vllm_tap.open_dataset(tmp_path)
    assert len(dataset.parts) > 1
    assert sorted(kept.metadata["index"] for kept in dataset) == list(range(len(prompts())))
    for kept in dataset:
        assert kept.prompt_token_ids == prompts()[kept.metadata["index"]]["prompt_token_ids"]
    compare(Recorded(dataset), references("llama"))
    assert set(dataset.facts.model) == {"name", "dtype"}
    assert_is_free(engine)


EVERY_THIRD = Positions.prompt(-2) | Positions.generated(step=3)
FROM_THE_END = Positions.generated(-3, -1)


@pytest.mark.parametrize("positions", ["all", "generated", "last", [0, -1], EVERY_THIRD, FROM_THE_END], ids=str)
def test_rows_of_a_running_sequence_are_those_of_a_capture(engine: Engine, positions: Any) -> None:
    """Put together they are bit-equal to the rows of a stream's samples; they come before the sequence ends."""
    spec = Spec(hidden_states="all", positions=positions)
    whole = {sample.index: sample for sample in Tap(engine.llm).stream(prompts((5, 33, 9)), spec, **GREEDY)}
    found: dict[int, list[Any]] = {}
    for block in Tap(engine.llm).stream_rows(prompts((5, 33, 9)), spec, **GREEDY):
        assert not (found.get(block.index) and found[block.index][-1].finished)
        found.setdefault(block.index, []).append(block)
    for index, blocks in found.items():
        assert blocks[-1].finished
        assert len(blocks) > 2 or positions not in ("all", "generated")
        assert torch.cat([b.positions for b in blocks]).tolist() == whole[index].positions.tolist()
        for layer in range(4):
            rows = torch.cat([block.hidden_states[layer] for block in blocks])
            expected = whole[index].hidden_states[layer]
            # The same tokens in batches of other sizes: products are added up in another order.
            assert error(rows, expected, expected.square().mean().sqrt()) < TOLERANCE
    assert sorted(found) == [0, 1, 2]


def test_the_row_of_a_token_comes_before_eight_more_are_generated(engine: Engine) -> None:
    """A monitor sees it in time."""
    late = []
    for block in Tap(engine.llm).stream_rows(prompts((5,)), Spec(hidden_states=[0]), **{**GREEDY, "max_tokens": 64}):
        late.append(len(block))
    assert max(late) <= 8 + 5  # the prompt's rows come together
    assert len(late) > 8


@pytest.mark.usefixtures("no_memory")
@pytest.mark.parametrize("on_full", ["wait", "spill"])
def test_twenty_times_the_budget_goes_through_a_stream(
    engine: Engine, references: Callable[[str], References], tmp_path: Path, on_full: str
) -> None:
    """With a reader that keeps up, prompts wait or rows go to files; nothing is lost, and memory has its bounds."""
    spec = Spec(hidden_states="all")
    many, arguments = prompts((100,) * 120), {**GREEDY, "max_tokens": 5}
    seen, held, num_bytes = set(), 0, 0
    given = Spill(tmp_path, 64 << 20) if on_full == "spill" else on_full
    for sample in Tap(engine.llm).stream(many, spec, budget_bytes=BUDGET, on_full=given, **arguments):
        seen.add(sample.index)
        num_bytes += sum(sample.hidden_states[layer].nbytes for layer in range(4))
        if len(seen) % 8 == 1:
            held = max(held, *(state["capacity_bytes"] for state in engine.status()))
            compare_layer(sample, references("llama"), 3)
    assert seen == set(range(len(many)))
    assert num_bytes > 20 * BUDGET
    assert held <= BUDGET
    assert list(tmp_path.iterdir()) == []
    assert_is_free(engine)
    assert engine.status()[0]["spilled_bytes"] == 0


def compare_layer(sample: Any, references: References, layer: int) -> None:
    """Compare the rows of a layer with Hugging Face's."""
    expected = references.of(sequence(sample.output)).hidden_states[layer]
    assert error(sample.hidden_states[layer], expected, expected.square().mean().sqrt()) < TOLERANCE


def test_a_prompt_that_runs_on_beside_many_holds_little(engine: Engine) -> None:
    """Parts that were handed over with its rows stay until it ends, and take no more than their rows."""
    long, others = prompts((3,)), prompts((9,) * 60, seed=1)
    params = [greedy(max_tokens=120), *(greedy(max_tokens=2) for _ in others)]
    # Rows of 1.5 MB. A reservation is a sixteenth of the budget, so 60 that stay whole would not fit.
    recording = Recording(engine.llm, Spec(hidden_states="all"), budget_bytes=4 << 20)
    outputs: list[Any] = [None] * len(params)
    collector = Collector(recording)
    for number, prompt in enumerate([*long, *others]):
        engine.llm.llm_engine.add_request(str(number), prompt, recording.mark(params[number], number))
    while engine.llm.llm_engine.has_unfinished_requests():
        for output in engine.llm.llm_engine.step():
            if output.finished:
                outputs[int(output.request_id)] = output
                collector.take()
                assert len(collector.result(int(output.request_id), output)[0])
    assert None not in outputs
    recording.stop()


@pytest.mark.usefixtures("no_memory")
def test_a_capture_larger_than_its_budget_lies_in_files(
    engine: Engine, references: Callable[[str], References], tmp_path: Path
) -> None:
    """Every row is Hugging Face's; the files go with the last tensor, also where it is not the result that is kept."""
    many = prompts((100, 3, 130, 40) * 18)
    spill = Spill(tmp_path, 64 << 20)
    result = engine.capture(many, Spec(hidden_states="all"), budget_bytes=BUDGET, on_full=spill)
    assert result.num_bytes > 20 * BUDGET
    (state,) = engine.status()
    assert 19 * BUDGET < state["spilled_bytes"] <= 64 << 20
    assert state["capacity_bytes"] <= BUDGET
    assert state["stalled_seconds"] > 0
    assert list(tmp_path.iterdir()) == []  # they have no name
    compare(result, references("llama"))
    kept = result[0].hidden_states[1]
    rows = kept.clone()
    kept[0] = 1.0  # a copy of this process's own
    del result
    wait_until(lambda: engine.status()[0]["num_blocks"] <= 2, "the end of most rows")
    assert torch.equal(kept[1:], rows[1:])
    del kept
    wait_until(lambda: not engine.status()[0]["spilled_bytes"], "the end of all files")
    assert_is_free(engine)


@pytest.mark.usefixtures("no_memory")
def test_files_that_are_full_or_cannot_be_end_a_capture(engine: Engine, tmp_path: Path) -> None:
    """With what to do; the engine goes on."""
    many, spec = prompts((100,) * 8), Spec(hidden_states="all")
    with pytest.raises(BudgetError, match=r"spilled rows fill \d+ bytes of files"):
        engine.capture(many, spec, budget_bytes=BUDGET, on_full=Spill(tmp_path, 100_000))
    with pytest.raises(SpecError, match="is no folder"):
        engine.capture(many, spec, on_full=Spill(tmp_path / "none"))
    with pytest.raises(SpecError, match="most_bytes is a positive"):
        engine.capture(many, spec, on_full=Spill(tmp_path, 0))
    with pytest.raises(SpecError, match="needs shared memory"):
        engine.capture(many, spec, on_full="spill", transport="inline")
    with pytest.raises(SpecError, match=r"on_full='wait' .*Tap\(llm\).stream"):
        engine.capture(many, spec, on_full="wait")
    assert_is_free(engine)
    assert engine.status()[0]["spilled_bytes"] == 0


def test_a_stream_that_may_not_wait_fails_when_the_budget_is_full(engine: Engine) -> None:
    """And gives the engine back, also while somebody holds the error."""
    with (
        pytest.raises(BudgetError) as caught,
        Tap(engine.llm).stream(
            prompts((100,) * 40), Spec(hidden_states="all"), budget_bytes=1 << 20, on_full="fail", **GREEDY
        ) as samples,
    ):
        list(samples)
    wait_until(lambda: not engine.used_bytes(), "the end of the memory")
    assert caught.value.budget_bytes == 1 << 20
    assert_is_free(engine)


def test_a_stream_that_is_left_gives_the_engine_back(engine: Engine) -> None:
    """By its block, by close, or because nobody holds it."""
    with Tap(engine.llm).stream(prompts(), EVERYTHING, **GREEDY) as samples:
        next(samples)
    assert_is_free(engine)
    stream = Tap(engine.llm).stream_rows(prompts(), EVERYTHING, **GREEDY)
    assert len(list(itertools.islice(stream, 3))) == 3
    del stream
    assert_is_free(engine)


def test_a_stream_refuses_what_a_capture_refuses(engine: Engine) -> None:
    """Before anything runs."""
    tap = Tap(engine.llm)
    with pytest.raises(SpecError, match="on_full='spil' is not known"):
        tap.stream(prompts(), EVERYTHING, on_full="spil")
    with pytest.raises(SpecError, match="has no field 'maxtokens'"):
        tap.stream(prompts(), EVERYTHING, maxtokens=3)
    with pytest.raises(SpecError, match="one sequence is generated for each prompt"):
        tap.stream_rows(prompts(), EVERYTHING, n=2)
    with pytest.raises(SpecError, match=r"expected a vllm.LLM"):
        Tap("model")
    for stream in (tap.stream, tap.stream_rows):
        for given in (prompts((5, 2)), ["bees and the sea", "a"]):  # known before they run, and behind
            with pytest.raises(PositionError, match=r"prompt 1 has . tokens? and no position 4") as caught:
                list(stream(given, Spec(hidden_states=[0], positions=[4]), **GREEDY))
            assert caught.value.sample == 1
        with pytest.raises(SpecError, match=r"^prompt 1 has token_type_ids"):
            list(stream([[5, 9], {"input_ids": [5, 9], "token_type_ids": [0, 1]}], EVERYTHING, **GREEDY))
    assert_is_free(engine)
