"""Captures from an engine that embeds rather than generates.

Runs in the test process, beside one eager Llama engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vllm_tap
from engine.engines import (
    PROMPT_LENGTHS,
    TOLERANCE,
    TRANSPORTS,
    Engine,
    References,
    error,
    expected_rows,
    prompts,
    rows_of,
)
from vllm_tap import Positions, Spec
from vllm_tap.errors import SpecError

pytestmark = [pytest.mark.engine, pytest.mark.gpu]

EVERYTHING = Spec(hidden_states="all", embeddings=True, final_hidden_states=True)


@pytest.fixture(scope="module")
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    """An engine for embeddings."""
    engine = Engine(tiny_model("llama"), enforce_eager=True, listens=True, runner="pooling", convert="embed")
    yield engine
    engine.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_row_is_that_of_hugging_face(engine, references: Callable[[str], References], transport):
    """All tokens of all prompts have their rows, also of prompts cut into chunks; nothing is generated."""
    result = vllm_tap.capture(engine.llm, prompts(), EVERYTHING, transport=transport, progress=False)
    assert [len(sample) for sample in result] == list(PROMPT_LENGTHS)
    for sample, prompt in zip(result, prompts(), strict=True):
        tokens = prompt["prompt_token_ids"]
        assert sample.token_ids.tolist() == tokens
        for stream in result.layers:
            for layer in result.layers[stream]:
                expected = expected_rows(references("llama").of(tokens), stream, layer)
                assert error(rows_of(sample, stream, layer), expected, expected.square().mean().sqrt()) < TOLERANCE


def test_the_progress_bar_ends_at_all_prompts_and_rows(engine, capsys):
    """As at a terminal, where it is shown unless one says otherwise."""
    result = vllm_tap.capture(engine.llm, prompts(), EVERYTHING, progress=True)
    shown = capsys.readouterr().err.rsplit("\r", 1)[-1]
    assert "100%|██████████|" in shown
    assert f"{result.num_rows:,} rows" in shown


def test_parameters_of_sampling_are_refused(engine):
    """A field of SamplingParams is no field of PoolingParams, and the message says which class it was looked up in."""
    with pytest.raises(SpecError, match="PoolingParams has no field 'max_tokens'"):
        vllm_tap.capture(engine.llm, prompts(), EVERYTHING, max_tokens=3)


def test_expressions_choose_from_prompts(engine):
    """Nothing is generated, so that part of an expression finds nothing."""
    positions = Positions.prompt(-3) | Positions.generated()
    result = vllm_tap.capture(engine.llm, prompts(), Spec(hidden_states=[1], positions=positions), progress=False)
    assert [sample.positions.tolist() for sample in result] == [list(range(max(n - 3, 0), n)) for n in PROMPT_LENGTHS]
