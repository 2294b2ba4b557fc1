"""The form of Hugging Face's outputs: which tensors go where, that they are views, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_tap import Spec
from vllm_tap.client.hugging_face import output_of
from vllm_tap.errors import SpecError

NUM_LAYERS = 3
WHOLE = Spec(hidden_states="all", embeddings=True, final_hidden_states=True)


def given(spec: Spec, expert_layers: list[int]) -> tuple[Any, Any]:
    """Return a sample and its capture of a model of three layers, each tensor filled with a number of its own."""
    every = {"hidden_states": [0, 1, 2], "router_logits": expert_layers, "embeddings": [0], "final_hidden_states": [2]}
    layers = {
        name: every[name] if getattr(spec, name) in ("all", True) else list(getattr(spec, name))
        for name in spec.streams
    }
    sample = SimpleNamespace(
        embeddings=torch.full((4, 2), 10.0),
        hidden_states={layer: torch.full((4, 2), 20.0 + layer) for layer in layers.get("hidden_states", [])},
        final_hidden_states=torch.full((4, 2), 30.0),
        router_logits={layer: torch.full((4, 5), 40.0 + layer) for layer in layers.get("router_logits", [])},
    )
    return sample, SimpleNamespace(layers=layers, spec=spec, num_layers=NUM_LAYERS, has_final_norm=True)


def test_every_tensor_is_in_its_place_and_a_view() -> None:
    """Embeddings, layers but the last, final norm; logits by layer with experts; no bytes are copied."""
    spec = Spec(hidden_states="all", embeddings=True, final_hidden_states=True, router_logits="all")
    sample, capture = given(spec, [1, 2])
    hidden_states, router_logits = output_of(sample, capture).to_tuple()  # type: ignore[attr-defined]
    assert hidden_states is not None
    assert router_logits is not None
    assert [float(rows[0, 0, 0]) for rows in hidden_states] == [10, 20, 21, 30]
    assert [tuple(rows.shape) for rows in hidden_states] == [(1, 4, 2)] * 4
    assert hidden_states[1].data_ptr() == sample.hidden_states[0].data_ptr()
    assert [float(rows[0, 0]) for rows in router_logits] == [41, 42]
    assert router_logits[0] is sample.router_logits[1]


def test_without_a_final_norm_the_last_layer_is_last() -> None:
    """An encoder's hidden states are its embeddings and the rows after each layer."""
    sample, capture = given(Spec(hidden_states="all", embeddings=True), [])
    capture.has_final_norm = False
    assert [float(rows[0, 0, 0]) for rows in output_of(sample, capture).hidden_states or ()] == [10, 20, 21, 22]
    sample, capture = given(Spec(hidden_states=[0, 1]), [])
    capture.has_final_norm = False
    with pytest.raises(SpecError, match=r"needs embeddings, hidden_states\[2\].*embeddings=True\)\."):
        output_of(sample, capture)


def test_what_was_not_captured_is_none() -> None:
    """Hidden states or router logits alone are enough; a model without experts has no router logits."""
    assert output_of(*given(WHOLE, [])).router_logits is None
    only = output_of(*given(Spec(router_logits="all"), [0, 2]))
    assert only.hidden_states is None
    assert len(only.router_logits or ()) == 2
    assert output_of(*given(Spec(router_logits="all"), [])).router_logits is None


def test_the_last_layer_itself_is_not_needed() -> None:
    """Hugging Face returns the last layer behind the norm only, so the other layers are enough."""
    spec = Spec(hidden_states=[0, 1], embeddings=True, final_hidden_states=True)
    assert len(output_of(*given(spec, [])).hidden_states or ()) == NUM_LAYERS + 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Spec(hidden_states="all"), r"needs embeddings, final_hidden_states.*Use Spec\(hidden_states=\"all\", emb"),
        (Spec(hidden_states=[1], embeddings=True, final_hidden_states=True), r"needs hidden_states\[0\],.*Use Spec"),
        (Spec(embeddings=True), r"has neither. Use Spec\(hidden_states=\"all\""),
        (Spec(hidden_states="all", embeddings=True, final_hidden_states=True, positions="last"), "leave positions out"),
        (Spec(router_logits=[1]), r"names layers \[1\]. Use Spec\(router_logits=\"all\"\)"),
    ],
)
def test_what_is_missing_is_named(spec: Spec, message: str) -> None:
    """A capture that lacks something raises, and says which Spec has it."""
    with pytest.raises(SpecError, match=message):
        output_of(*given(spec, [1, 2]))


READS = """
import sys
if {hidden}:
    sys.modules["transformers"] = None
import pickle, torch
from vllm_tap.client.model_output import HuggingFaceOutput
rows = (torch.zeros(1, 2, 3), torch.ones(1, 2, 3))
both = HuggingFaceOutput(rows, rows[:1])
assert both["hidden_states"] is both.hidden_states is both[0] is rows, both
assert list(both.keys()) == list(both) == ["hidden_states", "router_logits"], list(both)
assert both.to_tuple() == (rows, rows[:1]) == both[:], both
assert dict(both.items())["router_logits"] is both.router_logits
for alone, name in ((HuggingFaceOutput(rows), "hidden_states"), (HuggingFaceOutput(None, rows), "router_logits")):
    assert list(alone) == [name], list(alone)
    assert alone.to_tuple() == (rows,) == tuple(alone.values()), alone
    assert "nothing" not in alone
    again = pickle.loads(pickle.dumps(alone))
    assert type(again) is HuggingFaceOutput and list(again) == [name] and again[name][1].equal(rows[1])
assert HuggingFaceOutput(rows).router_logits is None
print([base.__module__.partition(".")[0] for base in HuggingFaceOutput.__mro__])
"""


@pytest.mark.parametrize("hidden", [False, True], ids=["with transformers", "without"])
def test_the_output_reads_as_those_of_transformers(hidden: bool) -> None:
    """By name, by key and by number, without what is None; it is one of theirs where they are installed."""
    code = READS.replace("{hidden}", str(hidden))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert ("transformers" in done.stdout) is not hidden
