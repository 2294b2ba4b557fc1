"""Replay records and their envelopes by the definitions of their readers. Without an engine."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest

from made_rows import EXPERT_LAYERS, NUM_CHOSEN, NUM_LAYERS, made
from vllm_tap import open_dataset
from vllm_tap.errors import LayerError, PositionError, SpecError
from vllm_tap.interchange import envelopes, replay


@pytest.fixture(scope="module", params=["capture", "dataset"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same rows in the process's memory and on the disk."""
    capture = made(experts=True, num_completions=2)
    if request.param == "capture":
        return capture
    folder = tmp_path_factory.mktemp("run") / "run"
    capture.save(folder)
    return open_dataset(folder)


def test_what_is_no_sample_is_refused(source: Any) -> None:
    """As a result of many."""
    with pytest.raises(SpecError, match=r"takes one sample, such as result\[0\], got a (Capture|Dataset)"):
        replay(source)


def test_a_record_has_all_layers(source: Any) -> None:
    """Ids and weights where a layer has experts, zeros where it has none; no row for the last token."""
    for completion in (0, 1):
        sample = source.sample(2, completion)
        record = replay(sample)
        tokens = len(sample.output.prompt_token_ids) + len(sample.output.outputs[completion].token_ids)
        assert record.ids.shape == record.weights.shape == (tokens - 1, NUM_LAYERS, NUM_CHOSEN)
        assert (record.ids.dtype, record.weights.dtype) == (np.int16, np.float32)
        assert (record.start, record.num_tokens, record.expert_layers) == (0, tokens, EXPERT_LAYERS)
        for layer in EXPERT_LAYERS:
            assert np.array_equal(record.ids[:, layer], sample.expert_ids[layer].numpy())
            assert np.array_equal(record.weights[:, layer], sample.expert_weights[layer].numpy())
        assert not record.ids[:, 0].any()
        assert not record.weights[:, 0].any()


def test_two_turns_make_one(source: Any) -> None:
    """A record from `start` on goes on where another one ended."""
    whole, later = replay(source[0]), replay(source[0], start=5)
    assert later.start == 5
    assert np.array_equal(np.concatenate([whole.ids[:5], later.ids]), whole.ids)
    assert len(replay(source[0], start=len(whole.ids)).ids) == 0


def test_generated_positions_alone() -> None:
    """The record starts where the prompt ends."""
    sample = made(experts=True, positions="generated")[0]
    record = replay(sample)
    assert record.start == len(sample.output.prompt_token_ids) == record.num_tokens - 1 - len(record.ids)


def test_the_last_position_and_dense_layers_by_choice(source: Any) -> None:
    """Zeros, the row before, or -1; signed where it must be."""
    record = replay(source[0])
    assert np.array_equal(record.padded("repeat")[-1], record.ids[-1])
    assert not record.padded(0)[-1].any()
    assert (record.padded(-1)[-1] == -1).all()
    assert len(record.padded(0)) == record.num_tokens
    assert (record.without_experts(-1)[:, 0] == -1).all()
    assert np.array_equal(record.without_experts(-1)[:, 1:], record.ids[:, 1:])
    with pytest.raises(SpecError, match="number or"):
        record.padded("zeros")


def test_envelopes(source: Any) -> None:
    """Each is read back by its definition: dtype, shape, where rows stand."""
    record = replay(source[0], start=2)
    ids = record.ids.astype(np.int64)
    read = np.load(io.BytesIO(base64.b64decode(envelopes.vllm_http(record))), allow_pickle=False)
    assert read.dtype == envelopes.vllm(record).dtype == np.uint16
    assert np.array_equal(read, ids)

    slime = envelopes.slime(record)
    flat = np.frombuffer(base64.b64decode(slime["routed_experts"]), np.int32)
    rows = record.num_tokens - 1 - slime["routed_experts_start_len"]
    assert np.array_equal(flat.reshape(rows, NUM_LAYERS, NUM_CHOSEN), ids)

    verl = envelopes.verl(record, left_padding=3, num_tokens=40)
    assert (verl.dtype, verl.shape) == (np.int16, (1, 40, NUM_LAYERS, NUM_CHOSEN))
    assert np.array_equal(verl[0, 5 : 5 + len(ids)], ids)
    assert not verl[0, :5].any()
    assert not verl[0, 5 + len(ids) :].any()
    with pytest.raises(SpecError, match="do not fit"):
        envelopes.verl(record, num_tokens=3)

    packed = envelopes.skyrl(record)
    data = np.frombuffer(base64.b64decode(packed["data"]), packed["dtype"]).reshape(packed["shape"])
    assert np.array_equal(data, ids)

    assert np.array_equal(envelopes.areal(record), ids.reshape(len(ids), -1))
    tunix = envelopes.tunix(record)
    assert np.array_equal(tunix[:-1, 1:], ids[:, 1:])
    assert (tunix[-1] == -1).all()
    assert (tunix[:, 0] == -1).all()


def test_weights_travel_as_bits(source: Any) -> None:
    """prime-rl's array with weights: ids, then float32 as int32, bit for bit."""
    record = replay(source[0])
    sent = envelopes.prime_rl(record, weights=True)
    read = np.frombuffer(base64.b64decode(sent["data"]), sent["dtype"]).reshape(sent["shape"])
    assert (sent["dtype"], sent["start"]) == ("int32", 0)
    assert np.array_equal(read[..., :NUM_CHOSEN], record.ids)
    assert read[..., NUM_CHOSEN:].tobytes() == record.weights.tobytes()


def test_what_is_missing_is_said() -> None:
    """Experts, and positions to the end."""
    with pytest.raises(LayerError, match=r"Capture with Spec\(routed_experts=\[1, 2, 3, 4, 5, 6, 7\]\)"):
        replay(made()[0])
    with pytest.raises(PositionError, match=r'Spec\(positions="all"\)'):
        replay(made(experts=True, positions="prompt")[0])
    with pytest.raises(PositionError):
        replay(made(experts=True)[0], start=-1)
    dense = made()
    dense.routing, dense.has_experts = {}, False
    with pytest.raises(SpecError, match="No layer of this model has experts"):
        replay(dense[0])
