"""Any selection equals a capture of everything from which the same is selected afterwards, bit by bit.

Worker and client run in the test process around random steps: see `host_engine`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draws import Draws
from host_engine import PLACES, HostEngine, outputs_of, recording_of, rows, states
from shadow import REDUCTIONS, Joined, wanted
from vllm_tap import Spec
from vllm_tap.client.collector import Collector
from vllm_tap.spec import resolve_layers

EVERYTHING = Spec(
    **dict.fromkeys(("hidden_states", "attention_output", "mlp_output"), "all"),
    embeddings=True,
    final_hidden_states=True,
)
CASES = st.tuples(st.integers(0, 2**32), st.booleans(), st.sampled_from([1, 3, 8, 64]))
"""Seed, whether the engine drafts, tokens of a step."""


class Sequence(NamedTuple):
    """A sequence: its place, its tokens that enter the model, what is asked for, and which of its positions."""

    sample: int
    completion: int
    tokens: list[int]
    spec: Spec
    at: list[int]


class Case:
    """Prompts with a Spec for each, and an engine to run them."""

    def __init__(self, drawn: tuple[int, bool, int], is_streamed: bool = False) -> None:
        seed, drafts, self.most_tokens = drawn
        draws = Draws(seed, (1, 9), reach=6)
        self.engine = HostEngine(seed, drafts)
        self.outputs = outputs_of(draws.random, draws.random.randint(1, 5), 1 if is_streamed else 3)
        self.specs = [draws.spec(not is_streamed) for _ in self.outputs]

    def sequences(self) -> Iterator[Sequence]:
        """Yield all sequences."""
        for sample, output in enumerate(self.outputs):
            spec = self.specs[sample]
            for completion in output.outputs:
                tokens = [*output.prompt_token_ids, *completion.token_ids[:-1]]
                at = wanted(spec.positions, len(output.prompt_token_ids), tokens)
                yield Sequence(sample, completion.index, tokens, spec, at)

    def captured(self, specs: Spec | list[Spec]) -> Any:
        """Capture all prompts."""
        recording = recording_of(self.engine, specs, self.outputs)
        for _ in self.engine.run(self.most_tokens):
            pass
        return recording.finish(self.outputs)

    def everything(self) -> Any:
        """Capture everything, in steps of its own."""
        return self.captured(EVERYTHING)


def rows_of(sample: Any, stream: str, layer: int) -> torch.Tensor:
    """Return rows of a sample."""
    found = getattr(sample, stream)
    return found if isinstance(found, torch.Tensor) else found[layer]


def selected(whole: torch.Tensor, spec: Spec, at: list[int]) -> torch.Tensor:
    """Return what a Spec makes of all rows of a sequence."""
    rows, dtype = whole[at], getattr(torch, spec.dtype) if spec.dtype else whole.dtype
    if spec.reduce is None or not at:
        return rows.to(dtype)
    return REDUCTIONS[spec.reduce](rows if spec.reduce == "last" else rows.float()).to(dtype)


def layers_of(spec: Spec) -> list[tuple[str, int]]:
    """Return the streams and layers that a Spec asks for."""
    found = []
    for stream in spec.streams:
        value, there = getattr(spec, stream), list(PLACES[stream][1])
        found += [(stream, layer) for layer in resolve_layers(stream, "all" if value is True else value, there, 4)]
    return found


def compare(sample: Any, sequence: Sequence, whole: Any) -> None:
    """Compare a sample with what is selected from all rows of its sequence."""
    spec, at = sequence.spec, sequence.at
    labels = at if spec.reduce is None else at[-1:]
    assert sample.spec == spec
    assert sample.positions.tolist() == labels
    assert sample.token_ids.tolist() == [sequence.tokens[position] for position in labels]
    for stream, layer in layers_of(spec):
        found, expected = rows_of(sample, stream, layer), selected(rows_of(whole, stream, layer), spec, at)
        assert found.dtype == expected.dtype
        assert found.equal(expected), (spec, stream, layer)


@settings(deadline=None, max_examples=10)
@given(CASES)
def test_everything_is_what_went_through_the_model(drawn: Any) -> None:
    """Of the final tokens, whatever was tried before."""
    case = Case(drawn)
    result = case.everything()
    for sequence in case.sequences():
        found = result.sample(sequence.sample, sequence.completion)
        for stream, layer in layers_of(EVERYTHING):
            assert rows_of(found, stream, layer).equal(rows(stream, layer, states(sequence.tokens)))


@settings(deadline=None, max_examples=40)
@given(CASES, st.booleans())
def test_any_selection_is_selected_from_everything(drawn: Any, is_one: bool) -> None:
    """A Spec for each sample, or one for all; reduced, in other dtypes."""
    case = Case(drawn)
    if is_one:
        case.specs = case.specs[:1] * len(case.specs)
    whole, result = case.everything(), case.captured(case.specs)
    for sequence in case.sequences():
        place = sequence.sample, sequence.completion
        compare(result.sample(*place), sequence, whole.sample(*place))
    assert case.engine.pool.stats().used_bytes == 0


@settings(deadline=None, max_examples=20)
@given(CASES, st.integers(1, 9))
def test_samples_that_are_taken_in_parts_are_the_same(drawn: Any, steps_between: int) -> None:
    """Whenever the rows are taken while the engine runs."""
    case = Case(drawn)
    whole = case.everything()
    recording = recording_of(case.engine, case.specs, case.outputs)
    collector = Collector(recording)
    for number, _ in enumerate(case.engine.run(case.most_tokens)):
        if number % steps_between == 0:
            collector.take()
    collector.take()
    results = [collector.result(sample, output) for sample, output in enumerate(case.outputs)]
    for sequence in case.sequences():
        mine = results[sequence.sample].sample(0, sequence.completion)
        compare(mine, sequence, whole.sample(sequence.sample, sequence.completion))
    assert collector.held_bytes == 0
    recording.stop()


@settings(deadline=None, max_examples=20)
@given(CASES)
def test_rows_that_are_read_while_their_sequence_runs_are_the_same(drawn: Any) -> None:
    """Those of each step, as soon as they are final, put together."""
    case = Case(drawn, is_streamed=True)
    whole = case.everything()
    recording = recording_of(case.engine, case.specs, case.outputs)
    collector = Collector(recording)
    blocks: list[list[Any]] = [[] for _ in case.outputs]
    sent = [0] * len(blocks)

    def read(sample: int, end: int) -> None:
        output = case.outputs[sample]
        so_far = SimpleNamespace(**vars(output))
        generated = end + 1 - len(output.prompt_token_ids)
        so_far.outputs = [SimpleNamespace(index=0, token_ids=output.outputs[0].token_ids[:generated])]
        blocks[sample].append(collector.rows_until(sample, so_far, sent[sample], end)[0])
        sent[sample] = end

    for _ in case.engine.run(case.most_tokens):
        collector.take()
        for sample, end in case.engine.known.items():
            if end >= len(case.outputs[sample].prompt_token_ids) and not case.specs[sample].needs_end:
                read(sample, end)
    for sequence in case.sequences():
        read(sequence.sample, len(sequence.tokens))
        compare(Joined(blocks[sequence.sample]), sequence, whole[sequence.sample])
        collector.drop(sequence.sample)  # drafts behind its end
    assert collector.held_bytes == 0
    recording.stop()


@settings(deadline=None, max_examples=15)
@given(CASES)
def test_captures_beside_one_another_keep_to_themselves(drawn: Any) -> None:
    """Each of three has its own samples, of requests in the same steps."""
    case = Case(drawn)
    whole = case.everything()
    parts = [[output if n % 3 == part else None for n, output in enumerate(case.outputs)] for part in range(3)]
    recordings = [recording_of(case.engine, case.specs, part) for part in parts]
    for _ in case.engine.run(case.most_tokens):
        pass
    results = [recording.finish(part) for recording, part in zip(recordings, parts, strict=True)]
    for sequence in case.sequences():
        place = sequence.sample, sequence.completion
        compare(results[sequence.sample % 3].sample(*place), sequence, whole.sample(*place))
    assert case.engine.pool.stats().used_bytes == 0
