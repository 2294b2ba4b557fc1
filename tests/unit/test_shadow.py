"""The check of the soak test finds what it is there for: rows that are wrong, lost, doubled or out of order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from reference import ReferenceModel
from shadow import Completion, Joined, Shadow, compare, wanted
from vllm_tap import Positions, Spec
from vllm_tap.spec import NAMED_POSITIONS, REDUCTIONS

PROMPT_LEN = 5
TOKENS = [7, 8, 9, 40, 41, 42, 43, 44]


@pytest.fixture(scope="module")
def reference(tiny_model: Any) -> ReferenceModel:
    """Hugging Face's tiny Llama."""
    return ReferenceModel(tiny_model("llama"))


class Capture:
    """A capture of one sequence, whose rows are those of the reference at these positions."""

    def __init__(self, reference: ReferenceModel, spec: Spec, at: list[int], labels: list[int] | None = None) -> None:
        states = reference.run(TOKENS).hidden_states[:, at]
        labels = at if labels is None else labels
        self.outputs = [
            SimpleNamespace(
                prompt_token_ids=TOKENS[:PROMPT_LEN],
                outputs=[SimpleNamespace(index=0, token_ids=[*TOKENS[PROMPT_LEN:], 1])],
            )
        ]
        self.rows = Rows(states, labels, spec)

    def sample(self, sample: int, number: int) -> Rows:
        return self.rows


class Rows:
    """The rows of one sequence, as a capture has them."""

    def __init__(self, states: torch.Tensor, labels: list[int], spec: Spec) -> None:
        self.spec = spec
        self.hidden_states = dict(enumerate(states))
        self.positions = torch.tensor(labels)
        self.token_ids = torch.tensor([TOKENS[position] for position in labels])

    def __len__(self) -> int:
        return len(self.positions)


def num_wrong(reference: ReferenceModel, capture: Any) -> int:
    shadow = Shadow(reference)
    shadow.check(capture)
    return shadow.num_wrong


EVERY = list(range(len(TOKENS)))


@pytest.mark.parametrize("positions", [*NAMED_POSITIONS, (0, 2, -1, 9, -9)])
def test_rows_that_are_right_pass(reference, positions):
    """The rows that a specification asks for, and no others, are right."""
    at = wanted(positions, PROMPT_LEN, TOKENS)
    capture = Capture(reference, Spec(hidden_states="all", positions=positions), at)
    shadow = Shadow(reference)
    assert shadow.check(capture) == len(at)
    assert shadow.num_wrong == 0


@pytest.mark.parametrize(
    ("at", "labels"),
    [
        (EVERY[:-1], None),
        (EVERY[1:], None),
        ([*EVERY, 7], None),
        ([0, 1, 2, 2, 3, 4, 5, 6, 7], None),
        ([1, 0, *EVERY[2:]], None),
        (EVERY[:-1], EVERY),
        ([0, 0, *EVERY[2:]], EVERY),
    ],
    ids=["last lost", "first lost", "last doubled", "one doubled", "order", "fewer than labels", "label of another"],
)
def test_rows_that_are_wrong_lost_or_doubled_are_counted(reference, at, labels):
    """Lost, doubled and exchanged rows are found, whether their labels tell or not."""
    assert num_wrong(reference, Capture(reference, Spec(hidden_states="all"), at, labels)) > 0


@pytest.mark.parametrize("value", [1e-3, float("nan")])
def test_one_wrong_value_is_one_wrong_row(reference, value):
    """A single number that is off, or none at all, makes its row wrong."""
    capture = Capture(reference, Spec(hidden_states="all"), EVERY)
    capture.rows.hidden_states[2][3, 17] += value
    assert num_wrong(reference, capture) == 1


MADE_OF: dict[str, Any] = {
    "last": lambda rows: rows[:, -1:],
    "mean": lambda rows: rows.mean(1, keepdim=True),
    "max": lambda rows: rows.amax(1, keepdim=True),
    "sum": lambda rows: rows.sum(1, keepdim=True),
}


@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_one_row_of_many_is_that_of_the_chosen_ones(reference, reduce, dtype):
    """Made otherwise, of one row less, labelled with another position or in another dtype it is wrong."""
    positions = Positions.prompt(-3) | Positions.generated()
    spec = Spec(hidden_states="all", positions=positions, reduce=reduce, dtype=dtype)
    at = wanted(positions, PROMPT_LEN, TOKENS)
    capture = Capture(reference, spec, at)
    states = torch.stack(list(capture.rows.hidden_states.values()))
    in_dtype = getattr(torch, dtype or "float32")

    def wrong(how: str, rows: torch.Tensor, label: int, given: torch.dtype = in_dtype) -> int:
        capture.rows = Rows(MADE_OF[how](rows).to(given), [label], spec)
        return num_wrong(reference, capture)

    assert wrong(reduce, states, at[-1]) == 0
    assert [wrong(other, states, at[-1]) for other in REDUCTIONS if other != reduce] == [1, 1, 1]
    assert wrong(reduce, states, at[0]) == wrong(reduce, states, at[-1], torch.bfloat16) == 1
    assert reduce == "max" or wrong(reduce, states[:, :-1], at[-1]) == 1


def test_rows_in_e4m3_are_those_of_the_reference(reference):
    """Within the error of three bits of mantissa; a scale that is off, or another dtype, is wrong."""
    spec = Spec(hidden_states="all", dtype="fp8")
    capture = Capture(reference, spec, EVERY)
    states, dtype = capture.rows.hidden_states, torch.float8_e4m3fn
    scale = {layer: rows.abs().amax(1, keepdim=True) / 448 for layer, rows in states.items()}
    elements = {layer: (rows / scale[layer]).to(dtype) for layer, rows in states.items()}
    vars(capture.rows).update(hidden_states_fp8=elements, hidden_states_scale=scale)
    assert num_wrong(reference, capture) == 0
    scale[2][3] *= 1.2
    assert num_wrong(reference, capture) == 1
    elements[0] = elements[0].float()
    assert num_wrong(reference, capture) == len(EVERY)


def test_blocks_of_a_sequence_are_checked_together(reference):
    """One that is lost, doubled or exchanged with another is found."""
    whole = Capture(reference, Spec(hidden_states="all"), EVERY)
    parts = [Capture(reference, Spec(hidden_states="all"), at).rows for at in (EVERY[:5], EVERY[5:7], EVERY[7:])]
    for order, is_right in (((0, 1, 2), True), ((0, 2), False), ((0, 1, 1, 2), False), ((1, 0, 2), False)):
        whole.rows = Joined([parts[n] for n in order])
        assert (num_wrong(reference, whole) == 0) == is_right


def test_sequences_in_a_batch_are_those_that_run_alone(reference):
    """Padding changes no more than the order of float32 sums, by which passes differ by up to 1e-5 (engines.py)."""
    sequences = [TOKENS, TOKENS[:1], [*TOKENS, *range(60, 160)]]
    for together, alone in zip(reference.run_batch(sequences), map(reference.run, sequences), strict=True):
        for name in ("hidden_states", "embedding", "final_normed", "logits"):
            torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-5, atol=1e-5)


def test_a_completion_without_rows_is_no_error(reference):
    """A request that ended with its first token has no generated rows."""
    capture = Capture(reference, Spec(hidden_states="all", positions="generated"), [])
    batch = reference.run(TOKENS[:PROMPT_LEN])
    assert compare(capture.rows, Completion(0, 0, PROMPT_LEN, TOKENS[:PROMPT_LEN]), batch).num_wrong == 0
