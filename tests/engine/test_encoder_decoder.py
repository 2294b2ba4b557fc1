"""A model that hears: rows of the decoder, whatever number of layers its encoder has. Runs in the test process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.engines import Engine, error
from models import byte_tokenizer
from vllm_tap import Spec

pytestmark = pytest.mark.engine

NUM_LAYERS, RATE = 4, 16000
SOUND = (np.sin(np.arange(RATE) / 40) * 0.3).astype(np.float32)
TOLERANCE = 1e-4
"""Of the root mean square of a layer: vLLM's encoder and its cross-attention add up 1500 positions in another order."""


def make_model(folder: Path, num_encoder: int) -> Any:
    """Write a small Whisper of random weights; return Hugging Face's of it."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=512, d_model=128, encoder_layers=num_encoder, decoder_layers=NUM_LAYERS, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=80, bos_token_id=256,
        eos_token_id=257, pad_token_id=0, decoder_start_token_id=256, begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2.0 if weight.dim() > 1 else 1.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer_config.json"):
        path = folder / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {"processor_class": "WhisperProcessor"}))
    return model


@pytest.mark.parametrize("num_encoder", [3, 4])
def test_rows_are_those_of_the_decoder(tmp_path: Path, num_encoder: int):
    """The configuration counts the encoder's layers; the rows are of the decoder's, and of all of them."""
    model = make_model(tmp_path, num_encoder)
    engine = Engine(tmp_path, enforce_eager=True, max_model_len=200, limit_mm_per_prompt={"audio": 1}, max_num_seqs=4,
                    max_num_batched_tokens=2048)  # fmt: skip
    sounds = [SOUND, SOUND * 0.5]
    given = [
        {
            "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": (sound, RATE)}},
            "decoder_prompt": {"prompt_token_ids": [256, 9, 8, 7 + index]},
        }
        for index, sound in enumerate(sounds)
    ]
    result = engine.capture(given, Spec(hidden_states="all", final_hidden_states=True), max_tokens=4)
    assert result.layers["hidden_states"] == list(range(NUM_LAYERS))
    extract = transformers.WhisperFeatureExtractor(feature_size=80)
    for sound, sample in zip(sounds, result, strict=True):
        features = extract(sound, sampling_rate=RATE, return_tensors="pt").input_features
        with torch.no_grad():
            expected = model.model(
                input_features=features, decoder_input_ids=sample.token_ids[None].long(), output_hidden_states=True
            ).decoder_hidden_states
        for layer, (rows,) in enumerate(expected[1:-1]):
            assert error(sample.hidden_states[layer], rows, rows.square().mean().sqrt()) < TOLERANCE
        (final,) = expected[-1]
        assert error(sample.final_hidden_states, final, final.square().mean().sqrt()) < TOLERANCE
    engine.close()
