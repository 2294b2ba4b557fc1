"""Captures of several engines as one: whatever engine had which prompt, they are as if one had had them all."""

from __future__ import annotations

import asyncio
import pickle
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_tap.client import shares
from vllm_tap.client.engines import Engines
from vllm_tap.client.joined import joined
from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.reduced import made_of, with_one_row_each
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import BudgetError, CaptureError, PositionError
from vllm_tap.positions import Positions
from vllm_tap.spec import Spec

WIDTH = 4
DTYPES = {"hidden_states": torch.bfloat16, "expert_ids": torch.uint8, "embeddings": torch.float32}
LAYERS = {"hidden_states": [0, 2], "expert_ids": [1], "embeddings": [0]}

PLACES = [(stream, layer) for stream, layers in LAYERS.items() for layer in layers]

SPECS = [
    Spec(hidden_states=[0, 2]),
    Spec(hidden_states=[0, 2], positions="prompt"),
    Spec(hidden_states=[0, 2], positions="generated", missing="skip"),
    Spec(hidden_states=[0, 2], positions=[1, -1], missing="skip"),
    Spec(hidden_states=[0, 2], positions=Positions.prompt(-3) | Positions.generated(-1)),
    Spec(hidden_states=[0, 2], reduce="max"),
    Spec(hidden_states=[0, 2], positions=[2], missing="skip", reduce="last"),
]


def output(sample: int, prompt_len: int, lengths: list[int]) -> Any:
    """An output of completions of these lengths, of tokens of its own."""
    completions = [
        SimpleNamespace(index=number, token_ids=[1000 * sample + 100 * number + n for n in range(length)])
        for number, length in enumerate(lengths)
    ]
    prompt = [-1000 * sample - n for n in range(prompt_len)]
    return SimpleNamespace(request_id=f"request {sample}", prompt_token_ids=prompt, outputs=completions)


def captured(outputs: list[Any], spec: Spec, places: list[tuple[str, int]] = PLACES) -> Capture:
    """A capture of rows that tell sample, completion, position, and layer."""
    sequences = Sequences(outputs, spec.positions)
    numbers, positions = sequences.position_of(sequences.wanted)
    slots = np.array(list(sequences.slots), np.int64).reshape(-1, 2)[numbers]
    rows = torch.from_numpy(np.column_stack([slots, positions, np.zeros_like(positions)]))
    tensors = {}
    for place in places:
        tensors[place] = (rows + torch.tensor([0, 0, 0, place[1]])).to(DTYPES[place[0]])
    source = made_of(OwnedRows(tensors), spec, sequences)
    if spec.reduce is not None:
        sequences = with_one_row_each(sequences)
    result = Capture(spec, outputs, sequences, [source], {}, {}, list(LAYERS), 3, True)
    result.seconds = {"finish": float(len(sequences.slots))}
    return result


def split(outputs: list[Any], engines: list[int]) -> list[list[Any]]:
    """Return the outputs of each engine, as long as all; engines without any are left out."""
    return [
        [output if engine == one else None for output, engine in zip(outputs, engines, strict=True)]
        for one in sorted(set(engines))
    ]


prompts = st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=2), st.integers(0, 2))


@given(st.lists(prompts, min_size=1, max_size=8), st.sampled_from(SPECS), st.integers(0, 60), st.integers(0, 60))
def test_whichever_engine_had_a_prompt(given_: list[Any], spec: Spec, start: int, stop: int) -> None:
    """Rows, labels, samples and slices are those of one capture of all prompts, and so is a copy that travels."""
    outputs = [output(sample, length, lengths) for sample, (length, lengths, _) in enumerate(given_)]
    whole = captured(outputs, spec)
    parts = [captured(mine, spec) for mine in split(outputs, [engine for *_, engine in given_])]
    result = joined(parts, outputs)
    for one in (result, pickle.loads(pickle.dumps(result))):
        assert (one.layers, one.num_rows, len(one)) == (whole.layers, whole.num_rows, len(whole))
        for mine, expected in zip(one.row_labels(), whole.row_labels(), strict=True):
            assert torch.equal(mine, expected)
        for stream, layer in PLACES:
            for bounds in ((0, None), (start, stop), (-stop, None)):
                mine, expected = (each.rows(stream, layer, *bounds) for each in (one, whole))
                assert mine.dtype == expected.dtype
                assert torch.equal(mine, expected)
        for (sample, completion), number in whole.sequences.slots.items():
            assert one.sequences.slots[sample, completion] == number
            ours, theirs = (each.sample(sample, completion) for each in (one, whole))
            assert torch.equal(ours.hidden_states[2], theirs.hidden_states[2])
            assert ours.token_ids.tolist() == theirs.token_ids.tolist()
    assert result.outputs == outputs
    assert result.seconds["finish"] == max(part.seconds["finish"] for part in parts)


def test_rows_of_a_sample_are_no_copy() -> None:
    """They lie where their engine has put them; those of several samples are a copy."""
    outputs = [output(sample, 3, [2]) for sample in range(4)]
    parts = [captured(mine, SPECS[0]) for mine in split(outputs, [0, 1, 0, 1])]
    result = joined(parts, outputs)
    for sample in range(4):
        there = parts[sample % 2].sample(sample).hidden_states[0]
        assert result[sample].hidden_states[0].data_ptr() == there.data_ptr()
    memory = {part.rows("hidden_states", 0).untyped_storage().data_ptr() for part in parts}
    assert result.rows("hidden_states", 0).untyped_storage().data_ptr() not in memory


def test_times_are_those_that_all_parts_know() -> None:
    """Captures of a stream know none."""
    outputs = [output(0, 2, [2]), output(1, 2, [2])]
    parts = [captured(mine, SPECS[0]) for mine in split(outputs, [0, 1])]
    parts[0].seconds |= {"start": 1.0}
    assert joined(parts, outputs).seconds == {"finish": 1.0}
    parts[1].seconds = {}
    assert joined(parts, outputs).seconds == {}


def test_engines_that_captured_other_layers_are_an_error() -> None:
    """A part of the rows would be missing."""
    outputs = [output(0, 2, [2]), output(1, 2, [2])]
    one, other = split(outputs, [0, 1])
    parts = [captured(one, SPECS[0]), captured(other, SPECS[0], [place for place in PLACES if place[1] < 2])]
    with pytest.raises(CaptureError, match=r"captured .*\[0, 2\].* and .*\[0\].*: capture again"):
        joined(parts, outputs)


class Recorded:
    """A recording in an engine that is not there."""

    begun: ClassVar[list[Recorded]] = []

    def __init__(self, connection: Any, spec: Spec, **options: Any) -> None:
        if connection.fails == "start":
            raise CaptureError("it broke")
        self.connection, self.spec, self.options = connection, spec, options
        self.has_ended, self.marked = False, []
        Recorded.begun.append(self)

    def mark(self, params: Any, sample: int) -> Any:
        """Note a sample."""
        self.marked.append(sample)
        return params, self.connection.number, sample

    def finish(self, outputs: list[Any]) -> Capture:
        """Return rows."""
        self.has_ended = True
        assert [sample for sample, output in enumerate(outputs) if output is not None] == self.marked
        if self.connection.fails == "finish":
            raise CaptureError("it broke")
        if self.connection.fails == "budget":
            raise BudgetError("it does not fit")
        result = captured(outputs, self.spec)
        shares.missing.check_result(self.spec, result.sequences, result)
        return result

    def stop(self) -> None:
        """Abandon it."""
        self.has_ended = True


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The recordings that begin."""
    monkeypatch.setattr(shares, "Recording", Recorded)
    monkeypatch.setattr(Recorded, "begun", [])
    return Recorded.begun


def engines(num: int, **fails: str) -> Engines:
    """Return engines, of which some fail."""
    connections: Any = {n: SimpleNamespace(number=n, fails=fails.get(f"engine_{n}")) for n in range(num)}
    return Engines(SimpleNamespace(engine_core=SimpleNamespace(core_engines=list(range(num)))), connections)


async def run(engines: Engines, outputs: list[Any], spec: Spec) -> Capture:
    """Capture prompts whose outputs are known."""
    async with shares.begun(engines, len(outputs), spec, budget_bytes=7) as begun:
        for sample in range(len(outputs)):
            assert begun.mark("params", sample) == ("params", begun.lives[sample].engine, sample)
        assert sum(one.num_requests for one in engines.lives) == len(outputs)
        return await begun.finish(outputs)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_prompts_are_spread(recorded: list[Recorded], num: int) -> None:
    """Evenly, each engine with a capture of its own; without prompts there is one, without rows."""
    outputs = [output(sample, 3, [3]) for sample in range(7)]
    result = asyncio.run(run(of := engines(num), outputs, SPECS[0]))
    assert torch.equal(result.rows("hidden_states", 2), captured(outputs, SPECS[0]).rows("hidden_states", 2))
    assert sorted(len(one.marked) for one in recorded) == sorted(len(range(n, 7, num)) for n in range(num))
    assert [one.options for one in recorded] == [{"budget_bytes": 7}] * num
    assert [one.num_requests for one in of.lives] == [0] * num
    assert len(asyncio.run(run(of, [], SPECS[0]))) == 0
    assert len(recorded) == num + 1


def test_engines_that_have_requests_get_fewer(recorded: list[Recorded]) -> None:
    """Until they have as many as others."""
    of = engines(2)
    with of.lives[0].counted(3):
        outputs = [output(sample, 2, [2]) for sample in range(5)]

        async def captured_beside() -> None:
            async with shares.begun(of, 5, SPECS[0]) as begun:
                assert sorted(one.engine for one in begun.lives) == [0, 1, 1, 1, 1]
                for sample in range(5):
                    begun.mark(None, sample)
                await begun.finish(outputs)

        asyncio.run(captured_beside())


@pytest.mark.parametrize("when", ["start", "finish", "budget"])
def test_one_engine_that_fails_ends_the_call(recorded: list[Recorded], when: str) -> None:
    """All captures have ended then, and it alone is blamed; rows that do not fit are no fault of an engine."""
    of = engines(3, engine_1=when)
    with pytest.raises(CaptureError):
        asyncio.run(run(of, [output(sample, 2, [2]) for sample in range(6)], SPECS[0]))
    assert all(one.has_ended for one in recorded)
    assert [one.failed > 0 for one in of.lives] == [False, when != "budget", False]
    assert [one.num_requests for one in of.lives] == [0, 0, 0]


def test_what_is_missing_is_said_of_all_prompts(recorded: list[Recorded]) -> None:
    """The error has the rows of all engines, and no engine is to blame."""
    of, outputs = engines(2), [output(sample, sample + 1, [2]) for sample in range(4)]
    with pytest.raises(PositionError, match=r"prompt 0 has 1 tokens and no position 2.* 2 of 4 sequences") as caught:
        asyncio.run(run(of, outputs, Spec(hidden_states=[0, 2], positions=[2])))
    assert caught.value.result.num_rows == 2
    assert len(caught.value.result) == 4
    assert [one.failed > 0 for one in of.lives] == [False, False]


@pytest.mark.parametrize("at", ["start", "run"])
def test_a_call_that_is_cancelled_ends_all_captures(
    recorded: list[Recorded], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Also those that are about to begin."""
    of = engines(3)

    async def start() -> None:
        async with shares.begun(of, 3, SPECS[0]):
            await asyncio.sleep(60)

    async def cancelled() -> None:
        task = asyncio.create_task(start())
        if at == "run":
            while len(recorded) < 3:
                await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert len(recorded) == 3
    assert all(one.has_ended for one in recorded)
    assert [one.num_requests for one in of.lives] == [0, 0, 0]
