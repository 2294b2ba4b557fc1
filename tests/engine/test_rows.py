"""Every row of every layer against Hugging Face, for each family and for compiled and eager models.

By default three engines cover each family and both modes: Llama compiled, Qwen3 and Gemma-3 eager.
VLLM_TAP_TEST_MATRIX=full runs all six combinations. Runs in the test process, beside one engine at a time.

Compiled models run twice: an engine without the plugin goes first and leaves its compiled graphs in the cache.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.engines import (
    FULL_MATRIX,
    MAX_NEW_TOKENS,
    PROMPT_LENGTHS,
    TOLERANCE,
    Engine,
    References,
    compare,
    compare_with_outputs,
    error,
    greedy,
    prompts,
    rows_of,
    sequence,
    surroundings,
)
from vllm_tap import Recording, Spec, capture
from vllm_tap.errors import LayerError, RowsMissingError, SpecError

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

BLOCKS = {"attention_output": "all", "mlp_output": "all"}
EVERYTHING = Spec(hidden_states="all", **BLOCKS, embeddings=True, final_hidden_states=True)


class Case(NamedTuple):
    """A model and how it runs; `plain` starts an engine without the plugin first."""

    family: str
    compiled: bool
    plain: bool

    def __str__(self) -> str:
        return f"{self.family}-{'compiled' if self.compiled else 'eager'}"


COVERING = [Case("llama", True, True), Case("qwen3", False, False), Case("gemma3", False, False)]
FULL = [Case(family, compiled, True) for family in ("llama", "qwen3", "gemma3") for compiled in (True, False)]
CASES = FULL if FULL_MATRIX else COVERING


class Running(NamedTuple):
    """An engine, what it is, and the tokens that it generates without the plugin, if that was tried."""

    case: Case
    engine: Engine
    plain_tokens: list[list[int]] | None
    plain_graphs: set[str]


def compiled_graphs() -> set[str]:
    """Return the keys under which vLLM has kept compiled models."""
    return {folder.name for folder in Path(os.environ["VLLM_CACHE_ROOT"]).glob("torch_compile_cache/*aot*/*")}


@pytest.fixture(scope="module", params=CASES, ids=str)
def running(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Iterator[Running]:
    """An engine with the plugin, whose compile cache is warm from one without."""
    case: Case = request.param
    folder, eager = tiny_model(case.family), not case.compiled
    plain_tokens = None
    if case.plain:
        with surroundings({"VLLM_TAP": "0"}):
            plain = Engine(folder, enforce_eager=eager)
            plain_tokens = plain.generate(prompts())
            plain.close()
    plain_graphs = compiled_graphs()
    engine = Engine(folder, enforce_eager=eager, listens=True)
    yield Running(case, engine, plain_tokens, plain_graphs)
    engine.close()


@pytest.fixture
def engine(running: Running) -> Engine:
    """The engine alone."""
    return running.engine


@pytest.fixture
def known(running: Running, references: Callable[[str], References]) -> References:
    """Hugging Face's forward passes of the engine's model."""
    return references(running.case.family)


def test_every_row_is_that_of_hugging_face(engine, known):
    """All rows of all layers, the embeddings and the normed states are right, also for prompts cut into chunks."""
    result = engine.capture(prompts(), EVERYTHING)
    compare(result, known)
    assert [len(sample) for sample in result] == [length + MAX_NEW_TOKENS - 1 for length in PROMPT_LENGTHS]
    layers = {stream: [0, 1, 2, 3] for stream in ("hidden_states", *BLOCKS)}
    assert result.layers == {**layers, "embeddings": [0], "final_hidden_states": [3]}


def test_a_sample_reads_as_hugging_face_returns_it(engine, known):
    """`as_hf` gives the L + 1 hidden states of `output_hidden_states=True`, the last one behind the final norm."""
    result = engine.capture(prompts(), EVERYTHING)
    compare_with_outputs(result, known)
    given = result[1].as_hf()
    width = result[1].embeddings.shape[-1]
    assert [tuple(rows.shape) for rows in given.hidden_states] == [(1, len(result[1]), width)] * 5
    assert given.router_logits is None


def test_all_transports_give_the_same_bits(engine):
    """Rows that cross in shared memory equal rows that cross in calls and over a network, bit by bit.

    One prompt of several chunks: which of several requests meet in a step depends on when each of them arrives.
    """
    shared = engine.capture(prompts([150]), EVERYTHING, transport="segment")
    for transport in ("inline", "tcp"):
        others = engine.capture(prompts([150]), EVERYTHING, transport=transport)
        for one, other in zip(shared, others, strict=True):
            for stream in EVERYTHING.streams:
                for layer in shared.layers[stream]:
                    assert rows_of(one, stream, layer).equal(rows_of(other, stream, layer))


def test_tokens_stay_the_same(running, engine, known):
    """Generation gives the same tokens without the plugin, with it, while it captures, and as Hugging Face has them."""
    idle = engine.generate(prompts())
    result = engine.capture(prompts(), EVERYTHING)
    assert [list(output.outputs[0].token_ids) for output in result.outputs] == idle
    assert running.plain_tokens in (None, idle)
    for output in result.outputs:
        logits = known.of(sequence(output)).logits[len(output.prompt_token_ids) - 1 :]
        assert list(output.outputs[0].token_ids) == logits.argmax(-1).tolist()


def test_a_dense_model_has_no_experts(engine):
    """Of all layers with experts a dense model has none: refused unless that may be; so is one that is named."""
    streams = {"router_logits": "all", "routed_experts": "all"}
    result = engine.capture(prompts(), Spec(hidden_states=[2], **streams, missing="skip"))
    assert len(result[0].router_logits) == len(result[0].expert_ids) == len(result[0].expert_weights) == 0
    assert len(result[0].hidden_states[2]) == len(result[0])
    assert result.routing == {}
    assert list(result.conventions) == ["hidden_states"]
    alone = engine.capture(prompts([5]), Spec(**streams, missing="skip"))
    assert (dict(alone[0].router_logits), dict(alone[0].expert_ids), len(alone[0])) == ({}, {}, 12)
    for stream in streams:
        with pytest.raises(SpecError, match=f"{stream}.*chooses no layer.*no layer with experts"):
            engine.capture(prompts(), Spec(hidden_states=[2], **{stream: "all"}))
        with pytest.raises(LayerError, match="layer 1 belongs to a model without experts"):
            engine.capture(prompts(), Spec(**{stream: [1]}))


def generated_positions(prompt_len: int, num_rows: int) -> list[int]:
    """Positions of the generated tokens that entered the model."""
    return list(range(prompt_len, num_rows))


def last_generated_position(prompt_len: int, num_rows: int) -> list[int]:
    """The last generated token that entered the model."""
    return [num_rows - 1]


@pytest.mark.parametrize(
    ("positions", "expected"),
    [("all", None), ("generated", generated_positions), ("last_generated", last_generated_position)],
)
def test_other_requests_in_the_same_steps_leave_no_rows(engine, known, positions, expected):
    """Rows are those of the captured requests when plain requests share every step with them."""
    plain = prompts([40, 2, 70, 21, 8, 100, 12, 6], seed=1)
    alone = engine.generate(plain)
    recording = Recording(engine.llm, Spec(hidden_states="all", positions=positions))
    given = [prompt for pair in zip(plain, prompts(), strict=True) for prompt in pair]
    params = [own for sample in range(8) for own in (greedy(), recording.mark(greedy(), sample))]
    outputs = engine.llm.generate(given, params, use_tqdm=False)
    compare(recording.finish(outputs[1::2]), known, expected)
    assert [list(output.outputs[0].token_ids) for output in outputs[::2]] == alone


def test_samples_need_not_come_in_order_nor_all(engine, known):
    """Requests may be added in any order; a sample without an output has no rows, and the others have theirs."""
    recording = Recording(engine.llm, EVERYTHING)
    params = [recording.mark(greedy(), sample) for sample in (2, 0, 1)]
    outputs = engine.llm.generate(prompts([12, 70, 33]), params, use_tqdm=False)
    result = recording.finish([outputs[1], None, outputs[0]])
    for sample, number in ((0, 1), (2, 0)):
        assert result[sample].token_ids.tolist() == sequence(outputs[number])
        expected = known.of(sequence(outputs[number])).hidden_states[3]
        scale = expected.square().mean().sqrt()
        assert error(result[sample].hidden_states[3], expected, scale) < TOLERANCE
    with pytest.raises(RowsMissingError):
        result[1]


def test_what_sampling_parameters_are_made_of_stays_the_callers(engine, monkeypatch):
    """The engine writes into the parameters that it is given: not into what the caller of `capture` holds."""
    given = []
    enqueue = engine.llm.enqueue

    def watched(prompts, params, **options):
        given[:] = params  # an engine's first capture sends a prompt of its own before
        return enqueue(prompts, params, **options)

    monkeypatch.setattr(engine.llm, "enqueue", watched)
    mine, params = [2], greedy(stop_token_ids=[2])
    for sampling in ({"stop_token_ids": mine, "max_tokens": 2}, {"sampling_params": params}):
        capture(engine.llm, prompts()[:1], Spec(hidden_states=[0]), progress=False, **sampling)
        assert [taken.stop_token_ids for taken in given] == [[2]]
        assert not any(kept is given[0].stop_token_ids for kept in (mine, params.stop_token_ids))
    assert not params.extra_args


def test_rows_of_another_request_are_not_taken(engine):
    """Where prompts agree at the positions that are asked for, labels do too: at the end of a template, as here."""
    given = [{"prompt_token_ids": [5, 9, 2]}, {"prompt_token_ids": [7, 8, 2]}]
    spec = Spec(hidden_states=[-1], positions="last")
    right, other = (sample.hidden_states[-1] for sample in engine.capture(given, spec))
    scale = right.square().mean().sqrt()
    assert error(other, right, scale) > 10 * TOLERANCE
    recording = Recording(engine.llm, spec)
    outputs = engine.llm.generate(given, recording.mark_all([greedy()] * 2), use_tqdm=False)
    with pytest.raises(RowsMissingError, match=r"first sample 0, .* its output is of request .* order of the samples"):
        recording.finish(outputs[::-1])
    for calls in ([given], [given[:1], given[1:]]):
        recording = Recording(engine.llm, spec)
        same = recording.mark(greedy(), 0)
        outputs = [output for call in calls for output in engine.llm.generate(call, same, use_tqdm=False)]
        assert error(recording.finish(outputs[:1])[0].hidden_states[-1], right, scale) < TOLERANCE


def test_a_recording_that_is_lost_or_left_ends(engine, known):
    """Nobody can end the first one; the second ends with its block, whatever happens in it; one that is kept stays."""
    Recording(engine.llm, EVERYTHING)
    compare(engine.capture(prompts(), EVERYTHING), known)
    with pytest.raises(ZeroDivisionError), Recording(engine.llm, EVERYTHING):
        1 / 0  # noqa: B018
    with Recording(engine.llm, EVERYTHING) as recording:
        compare(engine.capture(prompts(), EVERYTHING), known)
        outputs = engine.llm.generate(prompts(), recording.mark_all([greedy()] * 8), use_tqdm=False)
        result = recording.finish(outputs)
    compare(result, known)
    assert [state["captures"] for state in engine.status()] == [[]]
    assert result.sample(-1) == result[7] == result[-1] != result[0]
    assert result.index(result[3]) == 3


def test_the_progress_bar_ends_at_all_prompts_and_rows(engine, capsys):
    """As at a terminal, where it is shown unless one says otherwise."""
    result = engine.capture(prompts(), EVERYTHING, progress=True)
    shown = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert "100%|██████████|" in shown
    num_rows = max(state["num_rows"] for state in engine.status())  # with those of requests that had to begin anew
    assert f"{num_rows:,} rows" in shown
    assert num_rows >= result.num_rows


def test_the_end_of_all_steps_is_seen(engine):
    """The engine passes an empty step on when nothing is left to compute: there rows leave before anyone asks."""
    engine.llm.collective_rpc("vllm_tap_profile", args=("host",))
    engine.capture(prompts(), Spec(hidden_states=[0]), max_tokens=3)
    for figures in engine.llm.collective_rpc("vllm_tap_profile", args=("",)):
        assert 1 <= len(figures["rest"]) < len(figures["sampled"])


def test_requests_that_wait_in_the_engine_keep_their_outputs(engine, known):
    """A capture would run them and throw their outputs away: it is refused; a `Recording` runs beside them."""
    waiting = prompts([30, 5], seed=2)
    engine.llm.enqueue(waiting, greedy(), use_tqdm=False)
    with pytest.raises(SpecError, match=r"2 requests .* would be lost.*vllm_tap\.Recording"):
        engine.capture(prompts(), EVERYTHING)
    recording = Recording(engine.llm, EVERYTHING)
    engine.llm.enqueue(prompts(), recording.mark_all([greedy()] * 8), use_tqdm=False)
    outputs = engine.llm.wait_for_completion(use_tqdm=False)
    assert [list(output.prompt_token_ids) for output in outputs[:2]] == [p["prompt_token_ids"] for p in waiting]
    compare(recording.finish(outputs[2:]), known)


def test_graphs_with_taps_have_a_place_of_their_own_in_the_cache(running):
    """An engine with the plugin looks for compiled graphs elsewhere than one without, whose graphs have no taps."""
    if running.case.compiled and running.case.plain:
        assert compiled_graphs() > running.plain_graphs > set()
