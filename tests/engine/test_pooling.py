"""Captures from an engine that embeds rather than generates.

Runs in the test process, beside one eager Llama engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from transformers import AutoConfig, AutoModelForSequenceClassification

import vllm_tap
from easysteer import hidden_states
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
from models import _COMMON as SMALL
from models import byte_tokenizer
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


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Any]]:
    """An engine of a model that says one number of a text, and the same model in transformers."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        **{**SMALL, "model_type": "qwen3", "num_labels": 1, "pad_token_id": 0, "head_dim": 32}
    )
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    engine = Engine(folder, enforce_eager=True, runner="pooling")
    yield engine, model
    engine.close()


def test_a_classifier_runs_its_own_task(classifier):
    """Without a word of tasks, or with the one that it has; its outputs are those of `LLM.classify`."""
    engine, model = classifier
    given = prompts((5, 40, 17))
    plain = engine.llm.classify(given, use_tqdm=False)
    spec = Spec(hidden_states="all")
    for params in (None, vllm.PoolingParams(), vllm.PoolingParams(task="classify")):
        result = vllm_tap.capture(engine.llm, given, spec, progress=False, sampling_params=params)
        assert [one.outputs.probs for one in map(vllm.ClassificationRequestOutput.from_base, result.outputs)] == [
            one.outputs.probs for one in plain
        ]
        for sample, prompt in zip(result, given, strict=True):
            with torch.no_grad():
                ids = torch.tensor([prompt["prompt_token_ids"]])
                expected = model.model(ids, output_hidden_states=True).hidden_states
            for layer in range(3):  # the last one of transformers is normed
                rows = sample.hidden_states[layer]
                assert error(rows, expected[layer + 1][0], expected[layer + 1].square().mean().sqrt()) < TOLERANCE
    with pytest.raises(SpecError, match="no pooling task 'embed': it has"):
        vllm_tap.capture(engine.llm, given, spec, sampling_params=vllm.PoolingParams(task="embed"))
    rows, outputs = hidden_states.get_all_hidden_states(engine.llm, given)
    assert [one.outputs.probs for one in outputs] == [one.outputs.probs for one in plain]
    assert len(rows) == len(given)


def test_the_prompt_that_is_refused_is_named(classifier):
    """Also where a stream captures some at a time."""
    engine, _ = classifier
    given = [*prompts([3] * 66), {"prompt_token_ids": [5] * 300}]
    with pytest.raises(SpecError, match=r"vLLM refuses prompt 66, .*256 tokens"):
        vllm_tap.capture(engine.llm, given, Spec(hidden_states=[0]), progress=False)
    with pytest.raises(SpecError, match=r"vLLM refuses prompt 66, .*256 tokens") as caught:
        list(vllm_tap.Tap(engine.llm).stream(given, Spec(hidden_states=[0])))
    assert caught.value.sample == 66
