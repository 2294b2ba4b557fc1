"""A capture without an engine: its rows follow from their labels, so that any of them can be checked on its own.

Runs in the process that writes; tests compare what a reader returns with `row_bytes`, which knows nothing of datasets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_tap.client.sequences import Sequences
from vllm_tap.frame.routing import Routing
from vllm_tap.spec import Spec
from vllm_tap.store.source import ShardWriter

SPEC = Spec(hidden_states=[0, 3], router_logits=[1])
LAYERS = {"hidden_states": [0, 3], "router_logits": [1]}
DTYPES = {"hidden_states": torch.bfloat16, "router_logits": torch.float32}
WIDTHS = {"hidden_states": 24, "router_logits": 6}
MODEL = {"name": "synthetic", "dtype": "bfloat16"}


def row_bytes(stream: str, layer: int, position: int, token_ids: Sequence[int]) -> bytes:
    """Return the bytes of a row: they depend on the stream, the layer and all tokens up to the position."""
    nbytes = WIDTHS[stream] * DTYPES[stream].itemsize
    seed = f"{stream} {layer} {position} {list(token_ids[: position + 1])}".encode()
    return hashlib.shake_128(seed).digest(nbytes)


def tokens_of(prompt: str) -> list[int]:
    """Return token ids of a prompt."""
    return [1 + byte for byte in prompt.encode()]


def output_of(prompt: str, number: int, num_completions: int) -> Any:
    """Return what vLLM would: the prompt's tokens, and completions of up to four tokens that follow from it."""
    ids = tokens_of(prompt)
    completions = []
    for index in range(num_completions):
        drawn = hashlib.shake_128(f"{prompt} {index}".encode()).digest(5)
        generated = [300 + byte for byte in drawn[: 1 + drawn[4] % 4]]
        spans = [SimpleNamespace(version=f"step {index}", start=0, end=len(generated))]
        fields = {"text": f"<{generated}>", "finish_reason": "length", "weight_versions": spans}
        completions.append(SimpleNamespace(index=index, token_ids=generated, **fields))
    return SimpleNamespace(request_id=str(number), prompt=prompt, prompt_token_ids=ids, outputs=completions)


class SyntheticCapture:
    """Rows of prompts, as `Capture` holds them."""

    shard_writer: ShardWriter | None = None

    def __init__(self, prompts: Sequence[str], num_completions: int = 1, positions: str = "all") -> None:
        self.spec = Spec(hidden_states=[0, 3], router_logits=[1], positions=positions)
        self.layers, self.num_layers, self.has_final_norm = LAYERS, 4, True
        self.conventions = {"hidden_states": "after the layer", "router_logits": "the gate"}
        self.routing = {1: Routing(scoring="softmax", num_chosen=2, checked=True)}
        self.outputs = [output_of(prompt, number, num_completions) for number, prompt in enumerate(prompts)]
        self.sequences = Sequences(self.outputs, positions)

    def rows(self, stream: str, layer: int, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows of a layer."""
        flat = self.sequences.wanted[start:stop]
        found = []
        for number, position in zip(*self.sequences.position_of(flat), strict=True):
            begin, end = self.sequences.starts[number : number + 2]
            found.append(row_bytes(stream, layer, int(position), self.sequences.token_ids[begin:end].tolist()))
        data = torch.from_numpy(np.frombuffer(bytearray(b"".join(found)), np.uint8))
        return data.view(DTYPES[stream]).view(-1, WIDTHS[stream])


def prompts_of(count: int, seed: int = 0) -> list[str]:
    """Return prompts of a few letters, no two alike."""
    rng = np.random.default_rng(seed)
    return [f"{number}:" + "x" * int(rng.integers(0, 12)) for number in range(count)]


def bits(rows: Any) -> bytes:
    """Return the bytes of a tensor."""
    return rows.contiguous().view(torch.uint8).numpy().tobytes()


def check_dataset(dataset: Any, prompts: Sequence[str], num_completions: int = 1) -> None:
    """Compare every row, label and text of a dataset with those that follow from the prompts."""
    assert len(dataset) == len(prompts)
    for number, prompt in enumerate(prompts):
        output = output_of(prompt, number, num_completions)
        for completion in output.outputs:
            sample = dataset.sample(number, completion.index)
            ids = output.prompt_token_ids + completion.token_ids[:-1]
            assert sample.index == number
            assert sample.positions.tolist() == list(range(len(ids)))
            assert sample.token_ids.tolist() == ids
            for stream, layers in LAYERS.items():
                for layer in layers:
                    expected = b"".join(row_bytes(stream, layer, at, ids) for at in range(len(ids)))
                    assert bits(getattr(sample, stream)[layer]) == expected
            assert (sample.prompt, sample.text) == (prompt, completion.text)
            assert sample.generated_token_ids == completion.token_ids
    assert dataset.num_rows == sum(len(sample) for sample in dataset.sequences())
