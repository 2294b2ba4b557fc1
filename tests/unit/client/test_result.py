"""What a result says of its rows, what it suggests for those it lacks, and copies of it that travel."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_tap
from vllm_tap import Capture, LayerError, Spec, SpecError
from vllm_tap.client.sequences import Sequences
from vllm_tap.frame.routing import Routing
from vllm_tap.streams import NUMBERS

NUM_LAYERS = 4
WIDTHS = {"hidden_states": 8, "router_logits": 3, "expert_ids": 2}
LAYERS = {"hidden_states": [0, 2], "router_logits": [1, 3], "expert_ids": [1, 3], "embeddings": [0]}
DTYPES = {"hidden_states": torch.bfloat16, "expert_ids": torch.uint8}


class Rank:
    """Rows of a rank, each stream and layer of numbers of its own; views into one memory."""

    def __init__(self, num_rows: int, layers: dict[str, list[int]]) -> None:
        self.places = {(stream, layer): None for stream in layers for layer in layers[stream]}
        self._rows = {
            place: torch.arange(num_rows * WIDTHS.get(place[0], 8))
            .add(10 * seed)
            .to(DTYPES.get(place[0], torch.float32))
            for seed, place in enumerate(self.places)
        }

    def rows(self, stream: str, layer: int, start: int, stop: int) -> torch.Tensor:
        """Return a view."""
        return self._rows[stream, layer].view(-1, WIDTHS.get(stream, 8))[start:stop]


def output(name: str, prompt_len: int, *generated: int) -> Any:
    """An output of completions of so many tokens."""
    completions = [SimpleNamespace(index=i, token_ids=list(range(50, 50 + n))) for i, n in enumerate(generated)]
    return SimpleNamespace(request_id=name, prompt_token_ids=list(range(prompt_len)), outputs=completions)


def captured(
    spec: Spec | None = None,
    layers: dict[str, list[int]] = LAYERS,
    experts: tuple[int, ...] = (1, 3),
    norm: bool = True,
) -> Any:
    """A capture of three prompts, of which the second has two completions."""
    spec = spec or Spec(hidden_states=[0, 2], router_logits="all", embeddings=True, positions=[0, -1])
    outputs = [output("a", 4, 2), output("b", 3, 1, 4), None, output("d", 2, 3)]
    sequences = Sequences(outputs, spec.positions)
    rank: Any = Rank(len(sequences.wanted), layers)
    routing = {layer: routing_of() for layer in experts}
    return Capture(spec, outputs, sequences, [rank], {}, routing, list(layers), NUM_LAYERS, norm)


def routing_of() -> Routing:
    """How some router chooses."""
    fields = {"scoring": "softmax", "num_chosen": 2, "renormalized": True, "bias": None, "num_groups": 1}
    known = {**fields, "num_chosen_groups": 1, "scale": 1.0, "output_scale": 1.0, "checked": True, "reason": ""}
    return Routing(**{name: known[name] for name in Routing.__struct_fields__})


# --------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("positions", ["all", "generated", "last", (0, -1), (2,)])
def test_labels_say_which_sample_each_row_is_of(positions):
    """The rows of each sample, read one by one, are those that the labels name; a slice is a slice of them."""
    result = captured(Spec(hidden_states=[0], positions=positions))
    labels = result.row_labels()
    rows = result.rows("hidden_states", 0)
    assert {len(label) for label in labels} == {len(rows)}
    for sample, completion in result.sequences.slots:
        mine = (labels.samples == sample) & (labels.completions == completion)
        part = result.sample(sample, completion)
        assert rows[mine].equal(part.hidden_states[0])
        assert labels.positions[mine].equal(part.positions)
        assert labels.token_ids[mine].equal(part.token_ids)
    assert all(some.equal(label[1:3]) for some, label in zip(result.row_labels(1, 3), labels, strict=True))


def test_samples_without_rows_are_left_out_of_the_labels():
    """Of prompts of 4, 3 and 2 tokens two have a third: the matrix has their numbers beside it."""
    result = captured(Spec(hidden_states=[0], positions=[2], missing="skip"))
    assert result.row_labels().samples.tolist() == [0, 1, 1]
    assert result.row_labels().completions.tolist() == [0, 0, 1]
    assert [len(result.sample(*slot)) for slot in result.sequences.slots] == [1, 1, 1, 0]


# ---------------------------------------------------------------------------------------------------------------- hints


@pytest.mark.parametrize("name", ["routed_experts", *NUMBERS])
def test_streams_are_read_from_samples(name):
    """By their own names: what an attribute that is not there says to read is there."""
    result = captured(layers={**LAYERS, "expert_weights": [1, 3], "final_hidden_states": [3],
                              "attention_output": [1], "mlp_output": [1]})  # fmt: skip
    names = {"result": result, "sample": result[0], "layer": 1 if name != "hidden_states" else 0}
    with pytest.raises(AttributeError, match=f"^{name} are of samples") as caught:
        getattr(result, name)
    for said in re.findall(r"(?<= )\.[a-z_]+(?:\[layer\])?(?= )", str(caught.value)):
        assert len(eval(f"sample{said}", names)) == len(result[0])
    (rows,) = re.findall(r"\.rows\(.*?\)", str(caught.value))
    assert len(eval(f"result{rows}", names)) == result.num_rows
    if name == "routed_experts":
        assert all(len(rows) == len(result[0]) for rows in result[0].routed_experts[1])


def test_other_names_are_unknown():
    """In Python's words."""
    for owner in (captured(), captured()[0]):
        with pytest.raises(AttributeError, match=f"'{type(owner).__name__}' object has no attribute 'bees'"):
            owner.bees  # noqa: B018


@pytest.mark.parametrize("stream", ["hidden_states", "router_logits", "expert_ids", "expert_weights", "embeddings",
                                    "final_hidden_states"])  # fmt: skip
def test_the_hint_for_a_stream_works(stream):
    """What the message tells to use is a Spec, and one that has the stream."""
    result = captured(layers={"hidden_states": [0]} if stream != "hidden_states" else {"embeddings": [0]})
    with pytest.raises(SpecError, match="was not captured") as caught:
        getattr(result[0], stream)
    assert streams_of(hinted(caught.value)) >= {stream}
    with pytest.raises(SpecError, match="was not captured"):
        result.rows(stream, 0)


def hinted(error: Exception) -> Spec:
    """Return the specification that a message names."""
    found = re.search(r"Spec\(.*?\)(?=\.)", str(error))
    assert found is not None, error
    return eval(found[0], {"Spec": Spec})


def streams_of(spec: Spec) -> set[str]:
    """Return the streams of a result of this specification."""
    return {s for name in spec.streams for s in {"routed_experts": ("expert_ids", "expert_weights")}.get(name, (name,))}


@pytest.mark.parametrize(
    ("change", "stream", "says"),
    [
        ({"experts": ()}, "router_logits", "No layer of this model has experts"),
        ({"experts": ()}, "expert_weights", "No layer of this model has experts"),
        ({"norm": False}, "final_hidden_states", "no final norm"),
    ],
)
def test_what_a_model_does_not_have_is_not_suggested(change, stream, says):
    """No Spec would have the stream, and none is named."""
    result = captured(layers={"hidden_states": [0]}, **change)
    with pytest.raises(SpecError, match=says) as caught:
        result.rows(stream, 0)
    assert "Use Spec" not in str(caught.value)


@pytest.mark.parametrize(
    ("stream", "says"),
    [
        ("hidden", "no stream 'hidden'. Did you mean 'hidden_states'?"),
        ("logits", "no stream 'logits'. Did you mean 'router_logits'?"),
        ("zzz", "no stream 'zzz'. Known: hidden_states"),
        (3, "no stream 3. Known"),
        (None, "no stream None. Known"),
        ("routed_experts", 'read "expert_ids" or "expert_weights"'),
    ],
)
def test_a_stream_that_there_is_not_is_said_to_be_none(stream, says):
    """A wrong name is no stream that was not captured."""
    with pytest.raises(SpecError, match=re.escape(says)):
        captured().rows(stream, 0)


@pytest.mark.parametrize(
    ("stream", "layer", "layers"),
    [("hidden_states", 3, [0, 2, 3]), ("hidden_states", -1, [0, 2, 3]), ("hidden_states", 1, [0, 1, 2])],
)
def test_the_hint_for_a_layer_works(stream, layer, layers):
    """It names the layers that are there and the one that is not."""
    with pytest.raises(LayerError, match=f"layer {layer} was not captured") as caught:
        captured().rows(stream, layer)
    assert hinted(caught.value) == Spec(**{stream: layers})


def test_the_hint_for_a_layer_of_experts_names_the_field():
    """Ids and weights of experts are asked for together."""
    with pytest.raises(LayerError) as caught:
        captured(layers={"expert_ids": [1]}).rows("expert_ids", 3)
    assert hinted(caught.value) == Spec(routed_experts=[1, 3])


@pytest.mark.parametrize(
    ("stream", "layer", "says"),
    [
        ("hidden_states", 4, "whole numbers from 0 to 3"),
        ("hidden_states", -5, "whole numbers from 0 to 3"),
        ("hidden_states", 1.5, "whole numbers from 0 to 3"),
        ("router_logits", 0, r"Layers of this model with experts: \[1, 3\]"),
        ("embeddings", 1, r"read `sample\.embeddings`"),
    ],
)
def test_a_layer_that_cannot_be_is_not_suggested(stream, layer, says):
    """No Spec would have it, and none is named."""
    with pytest.raises(LayerError, match=says) as caught:
        captured().rows(stream, layer)
    assert "Spec" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------------- copies

COPIES = {
    "pickle": lambda given: pickle.loads(pickle.dumps(given)),
    "oldest pickle": lambda given: pickle.loads(pickle.dumps(given, 0)),
    "read-only pickle": lambda given: unpickled(given, bytes),
    "deepcopy": copy.deepcopy,
    "a copy of a copy": lambda given: copy.deepcopy(pickle.loads(pickle.dumps(given))),
}


def unpickled(given: Any, kind: Any) -> Any:
    """Return what comes back from buffers that lie in memory nobody may write."""
    buffers: list[Any] = []
    data = pickle.dumps(given, 5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[kind(buffer.raw()) for buffer in buffers])


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_result_has_everything(copied):
    """Rows of every stream and layer, labels, outputs and what is known of the model; and it owns them."""
    result = captured()
    again = copied(result)
    assert vars(again.spec) == vars(result.spec)
    assert again.outputs == result.outputs
    for name in ("layers", "conventions", "routing", "seconds", "num_layers", "num_rows", "num_bytes"):
        assert getattr(again, name) == getattr(result, name)
    assert all(one.equal(other) for one, other in zip(again.row_labels(), result.row_labels(), strict=True))
    for stream, layers in result.layers.items():
        for layer in layers:
            rows, mine = result.rows(stream, layer), again.rows(stream, layer)
            assert mine.dtype == rows.dtype
            assert mine.equal(rows)
            before = rows.clone()
            mine.zero_()
            assert rows.equal(before)
    with pytest.raises(LayerError, match="layer 3 was not captured"):
        again[0].hidden_states[3]


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_sample_has_its_own_rows(copied):
    """One completion with its labels, of all streams; alone in a capture of its own."""
    result = captured()
    for slot in result.sequences.slots:
        sample = result.sample(*slot)
        again = copied(sample)
        assert again.positions.equal(sample.positions)
        assert again.token_ids.equal(sample.token_ids)
        assert again.embeddings.equal(sample.embeddings)
        for stream in ("hidden_states", "router_logits", "expert_ids"):
            mine, theirs = getattr(again, stream), getattr(sample, stream)
            assert list(mine) == list(theirs)
            assert all(mine[layer].equal(theirs[layer]) for layer in theirs)
        assert again._capture.outputs == [result.outputs[slot[0]]]


def doubled(sample: Any) -> Any:
    """Compute something in another process."""
    return sample, sample.hidden_states[2] * 2


def test_samples_go_to_other_processes_and_come_back():
    """As of a pool of workers, which send tensors in a way of torch's."""
    samples = list(captured(Spec(hidden_states=[0, 2], positions="all"))._only(0, ["hidden_states"]))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        for sample, (again, twice) in zip(samples, pool.map(doubled, samples), strict=True):
            assert again.token_ids.equal(sample.token_ids)
            assert again.hidden_states[0].equal(sample.hidden_states[0])
            assert twice.equal(sample.hidden_states[2] * 2)


def test_a_copy_of_a_stream_has_no_other():
    """A stream of a sample can be sent as it is; it brings its own rows and nothing else."""
    stream = captured()[3].hidden_states
    again = pickle.loads(pickle.dumps(stream))
    assert dict.keys(dict(again)) == {0, 2}
    assert all(again[layer].equal(stream[layer]) for layer in stream)
    assert list(again._capture.layers) == ["hidden_states"]


def test_a_pickled_sample_is_as_long_as_its_rows():
    """Views carry their own bytes, not the memory that they lie in."""
    spec = Spec(hidden_states=[0])
    result = captured(spec, {"hidden_states": [0]})
    whole, alone = len(pickle.dumps(result)), len(pickle.dumps(result.sample(1, 0)))
    assert alone < whole


def test_a_shallow_copy_shares_the_rows():
    """`copy.copy` makes another object over the same memory."""
    result = captured()
    assert copy.copy(result).rows("hidden_states", 0).data_ptr() == result.rows("hidden_states", 0).data_ptr()


def test_the_package_exports_what_results_are_made_of():
    """Classes to annotate with, and errors to catch."""
    result = captured()
    assert isinstance(result[0].hidden_states, vllm_tap.LayerMap)
    assert isinstance(result.row_labels(), vllm_tap.RowLabels)
    assert isinstance(result[0], vllm_tap.Sample)
