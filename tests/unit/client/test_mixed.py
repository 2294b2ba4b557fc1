"""A result whose samples have different streams and layers, made of parts. Without an engine."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_tap.client.mixed import MixedCapture
from vllm_tap.client.owned import OwnedRows, SomeRows
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.client.wishes import Wishes
from vllm_tap.errors import DatasetError, LayerError, RowsMissingError, SpecError
from vllm_tap.spec import Spec

SPECS = [
    Spec(hidden_states=[0, 1]),
    Spec(hidden_states=[1], positions="last"),
    Spec(hidden_states=[0, 1], positions="prompt"),
    Spec(embeddings=True),
]
PARTS = [(0, 2), (1,), (3,)]
LAYERS: list[dict[str, list[int]]] = [{"hidden_states": [0, 1]}, {"hidden_states": [1]}, {"embeddings": [0]}]


def output(sample: int) -> Any:
    """An output of a prompt of three tokens more than its number."""
    completions = [SimpleNamespace(index=number, token_ids=[90 + number, 99]) for number in range(2)]
    return SimpleNamespace(request_id=str(sample), prompt_token_ids=list(range(sample + 3)), outputs=completions)


@pytest.fixture
def result() -> MixedCapture:
    """Four samples with two completions each; rows are numbered by sample, completion, position and layer."""
    wishes, outputs = Wishes(SPECS), [output(sample) for sample in range(len(SPECS))]
    parts = []
    for members, layers in zip(PARTS, LAYERS, strict=True):
        mine = [each if sample in members else None for sample, each in enumerate(outputs)]
        sequences = Sequences(mine, lambda sample: wishes.of(sample).positions)
        slots = list(sequences.slots)
        numbers, positions = sequences.position_of(sequences.wanted)
        of_row = [[*slots[number], position] for number, position in zip(numbers, positions.tolist(), strict=True)]
        tensors = {
            (stream, layer): torch.tensor([[*row, layer] for row in of_row], dtype=torch.float32)
            for stream in ("hidden_states", "embeddings")
            for layer in range(3)
        }
        places = {(stream, layer) for stream, numbers in layers.items() for layer in numbers}
        some = SomeRows(OwnedRows(tensors), places)
        part = Capture(SPECS[members[0]], mine, sequences, [some], {}, {}, list(layers), 3, True)
        part.specs = SPECS
        parts.append(part)
    return MixedCapture(parts, outputs)


def test_each_sample_has_its_own_places(result: MixedCapture) -> None:
    """And rows in no other; its Spec is named where it is asked for one."""
    assert [sample.spec for sample in result] == SPECS
    assert [sample.index for sample in result] == [0, 1, 2, 3]
    assert result.layers == {"hidden_states": [0, 1], "embeddings": [0]}
    assert result.sample(-3, 1).hidden_states[1].tolist() == [[1, 1, 3, 1]]
    assert result[3].embeddings[:, 0].tolist() == [3] * 7
    with pytest.raises(
        LayerError, match=r"layer 0 was not captured: hidden_states of samples with Spec\(.*has layers \[1\]"
    ):
        result[1].hidden_states[0]
    with pytest.raises(SpecError, match=r"embeddings was not captured: samples with Spec\("):
        _ = result[0].embeddings
    with pytest.raises(RowsMissingError, match="no completion 2"):
        result.sample(3, 2)
    with pytest.raises(IndexError):
        result[4]


@pytest.mark.parametrize(("start", "stop"), [(0, None), (3, 9), (-2, None)])
def test_rows_and_labels_of_a_layer_are_in_the_order_of_the_samples(
    result: MixedCapture, start: int, stop: int | None
) -> None:
    """Of all that have it, completion after completion."""
    rows = result.rows("hidden_states", 1, start, stop)
    whole = [result.sample(n, c).hidden_states[1] for n in range(3) for c in range(2)]
    assert rows.equal(torch.cat(whole)[start:stop])
    labels = result.row_labels(start, stop, stream="hidden_states", layer=-2)
    assert torch.stack([labels.samples, labels.completions, labels.positions], 1).tolist() == rows[:, :3].tolist()
    alone = result.row_labels(stream="embeddings", layer=0)
    assert set(alone.samples.tolist()) == {3}
    assert result.num_rows == sum(len(result.sample(n, c)) for n in range(4) for c in range(2))


def test_what_no_sample_has_is_refused(result: MixedCapture) -> None:
    """As in any other result; a dataset has one Spec, and labels are those of one layer."""
    with pytest.raises(LayerError, match="layer 2 was not captured"):
        result.rows("hidden_states", 2)
    with pytest.raises(SpecError, match="router_logits was not captured"):
        result.rows("router_logits", 0)
    with pytest.raises(SpecError, match=r"row_labels\(stream"):
        result.row_labels()
    with pytest.raises(DatasetError, match="has one Spec"):
        result.save("nowhere")


def test_a_copy_owns_its_rows(result: MixedCapture) -> None:
    """Of all samples, or of one, which keeps its Spec."""
    copy = pickle.loads(pickle.dumps(result))
    assert copy.rows("hidden_states", 1).equal(result.rows("hidden_states", 1))
    sample = pickle.loads(pickle.dumps(result[2]))
    assert sample.spec == SPECS[2]
    assert sample.hidden_states[0].equal(result[2].hidden_states[0])
