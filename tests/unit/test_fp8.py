"""Rows in e4m3 on every way out of a capture: results, copies, datasets, frames of a server. Without an engine."""

from __future__ import annotations

import asyncio
import pickle
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from host_engine import HostClient, HostEngine, Prompt
from vllm_tap import LayerError, Recording, Spec, SpecError, open_dataset
from vllm_tap.client.bodies import Samples
from vllm_tap.client.result import Capture
from vllm_tap.frame import body
from vllm_tap.interchange import source
from vllm_tap.serve.reply import Reply
from vllm_tap.store.dtypes import to_numpy

PROMPTS = ([1, 2, 3, 4, 5], [2, 1])
LAYERS = [0, 2]
PAIR = "hidden_states_fp8", "hidden_states_scale"


@pytest.fixture(scope="module")
def results() -> tuple[Capture, Capture]:
    """Captures of the same requests: of hidden states as they are, and in e4m3."""
    engine = HostEngine(random.Random(7), drafts=False)
    prompts = [Prompt(str(n), ids, [[3, 4, 5]]) for n, ids in enumerate(PROMPTS)]
    clients = [HostClient(engine), HostClient(engine)]
    specs = Spec(hidden_states=LAYERS), Spec(hidden_states=LAYERS, dtype="fp8")
    recordings = [Recording(client, spec) for client, spec in zip(clients, specs, strict=True)]
    for client, recording in zip(clients, recordings, strict=True):
        for sample, prompt in enumerate(prompts):
            params = SimpleNamespace(n=1, max_tokens=3, extra_args=None, skip_reading_prefix_cache=False)
            prompt.requests[0].params.append((client, recording.mark(params, sample)))
    for _ in engine.run([prompt.requests[0] for prompt in prompts]):
        pass
    plain, small = (recording.finish([prompt.output() for prompt in prompts]) for recording in recordings)
    return plain, small


def check(sample: Any, plain: Any) -> None:
    """Compare a sample with the same one of the model's dtype: torch's own conversion, of rows that are scaled."""
    for layer in LAYERS:
        exact = plain.hidden_states[layer].float()
        scale = exact.abs().amax(1, keepdim=True) / 448
        elements, scales = sample.hidden_states_fp8[layer], sample.hidden_states_scale[layer]
        assert scales.equal(scale)
        assert elements.view(torch.uint8).equal((exact / scale).to(torch.float8_e4m3fn).view(torch.uint8))
        assert (
            (elements.float() * scales - exact).abs() <= torch.maximum(exact.abs() / 16, scale / 1024) * 1.001
        ).all()
    assert sample.positions.equal(plain.positions)


def test_a_result_has_elements_and_scales(results: tuple[Capture, Capture]) -> None:
    """In place of hidden states; a copy too; what reads hidden states says that they are not there."""
    plain, small = results
    assert small.layers == dict.fromkeys(PAIR, LAYERS)
    for sample, other in zip(small, plain, strict=True):
        check(sample, other)
        check(pickle.loads(pickle.dumps(sample)), other)
    check(pickle.loads(pickle.dumps(small))[1], plain[1])
    assert small.num_bytes == small.num_rows * len(LAYERS) * (6 + 4)
    assert "multiplied by hidden_states_scale" in small.conventions["hidden_states_fp8"]
    with pytest.raises(
        SpecError, match=r"hidden_states was not captured.*\['hidden_states_fp8', 'hidden_states_scale'"
    ):
        _ = small[0].hidden_states
    with pytest.raises(SpecError, match=r'Spec\(hidden_states="all", dtype="fp8"\)'):
        _ = plain[0].hidden_states_scale
    with pytest.raises(LayerError, match=r"Spec\(hidden_states=\[0, 1, 2\]\)"):
        _ = small[0].hidden_states_fp8[1]
    with pytest.raises(SpecError, match="as_hf needs hidden states"):
        small[0].as_hf()


def test_a_dataset_keeps_them(results: tuple[Capture, Capture], tmp_path: Path) -> None:
    """Bit for bit, and without torch as float32 of the same values."""
    plain, small = results
    small.save(tmp_path / "run")
    dataset = open_dataset(tmp_path / "run")
    assert dataset.spec == small.spec
    for sample, other in zip(dataset, plain, strict=True):
        check(sample, other)
        array = sample.hidden_states_fp8.numpy(2)
        assert array.dtype == np.float32
        assert np.array_equal(array, sample.hidden_states_fp8[2].float().numpy())
    assert np.array_equal(source.numpy_rows(dataset, PAIR[0], 0, 0, 3), dataset[0].hidden_states_fp8.numpy(0)[:3])


def test_a_servers_frames_keep_them(results: tuple[Capture, Capture]) -> None:
    """As its client reads them."""
    _, small = results
    frames: list[bytes] = []
    kept: Any = SimpleNamespace(add=lambda result, frame: frames.append(frame), end=lambda result, frame: None)
    reply = Reply(kept, SimpleNamespace(id="x"), dict.fromkeys(PAIR, LAYERS))  # type: ignore[arg-type]
    asyncio.run(reply.add(reply.expect(), small, True))
    assert reply.handle["dtype"] == dict(zip(PAIR, ("float8_e4m3fn", "float32"), strict=True))
    reader = Samples()
    for frame in body.Reader().feed(b"".join(map(bytes, frames))):
        reader.add(frame)
    rows = reader._rows[0, 0][0].tensors
    assert rows[PAIR[0], 2].view(torch.uint8).equal(small[0].hidden_states_fp8[2].view(torch.uint8))
    assert rows[PAIR[1], 2].equal(small[0].hidden_states_scale[2])


def test_all_numbers_of_e4m3_without_torch() -> None:
    """As torch reads them."""
    codes = np.arange(256, dtype=np.uint8)
    right = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(to_numpy(codes, "float8_e4m3fn", 1)[:, 0], right, equal_nan=True)
