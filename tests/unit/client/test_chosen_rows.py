"""Any choice of rows equals taking everything and choosing afterwards: bit for bit, in every scheduling state.

Worker and client sides run in this process, on rows of `host_engine`; three clients capture beside one another, and the
one that takes everything is compared with the rows that were made.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from host_engine import VOCABULARY, HostClient, HostEngine, Prompt
from shadow import wanted
from unit.test_positions import BOUND, TREE, built, expected
from vllm_tap import Recording, Spec
from vllm_tap.client.collector import Collector
from vllm_tap.spec import DTYPES, NAMED_POSITIONS, REDUCTIONS

EVERYTHING = Spec(hidden_states="all", embeddings=True, routed_experts="all")

PARAMS = {"max_tokens": 9, "extra_args": None, "skip_reading_prefix_cache": False}


class Wish:
    """A Spec, and which positions it means by Python's own slices and sets."""

    def __init__(self, fields: dict[str, Any], tree: Any, named: Any) -> None:
        self._tree, self._named = tree, named
        positions = named if tree is None else built(tree)
        self.spec = Spec(**fields, positions=positions, missing="skip")
        layers = {None: [], "all": [0, 1, 2], (1,): [1], (-1, 0): [0, 2]}[self.spec.hidden_states]
        self.places = [("hidden_states", layer) for layer in layers] + [("embeddings", 0)] * self.spec.embeddings
        if self.spec.dtype == "fp8":
            self.places = [(name, n) for name in ("hidden_states_fp8", "hidden_states_scale") for n in layers]
        self.places += [("expert_ids", 1), ("expert_weights", 1)] if self.spec.routed_experts else []

    def at(self, token_ids: list[int], prompt_len: int) -> list[int]:
        """Return the positions in a sequence."""
        if self._tree is None:
            return wanted(self.spec.positions, prompt_len, token_ids)
        return sorted(expected(self._tree, token_ids, prompt_len))

    def of(self, whole: Any, at: list[int], stream: str, layer: int) -> torch.Tensor:
        """Return what it makes of the rows of a sample at its positions."""
        how, is_fp8 = self.spec.reduce, self.spec.dtype == "fp8"
        rows = rows_of(whole, "hidden_states" if is_fp8 else stream, layer)[at]
        dtype = getattr(torch, self.spec.dtype or str(rows.dtype).removeprefix("torch."), None)
        if how == "last":
            rows = rows[-1:]
        elif how is not None and len(rows):
            exact = rows.float()
            rows = {"mean": exact.mean, "sum": exact.sum, "max": exact.amax}[how](0, keepdim=True)
        if is_fp8:
            scale = rows.float().abs().amax(1, keepdim=True) / 448
            return scale if stream == "hidden_states_scale" else (rows.float() / scale).to(torch.float8_e4m3fn)
        return rows.to(dtype) if rows.is_floating_point() else rows


GENERATED = st.tuples(st.just("generated"), BOUND, BOUND, st.integers(2, 4))
"""What an engine that drafts cannot choose from."""


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    """Any Spec that has a stream."""
    fields = {
        "hidden_states": draw(st.sampled_from([None, "all", [1], [-1, 0]])),
        "embeddings": draw(st.booleans()),
        "reduce": draw(st.sampled_from([None, *REDUCTIONS])),
        "dtype": draw(st.sampled_from([None, *DTYPES])),
    }
    fields["routed_experts"] = draw(st.sampled_from([None, "all"])) if fields["reduce"] in (None, "last") else None
    if fields["dtype"] == "fp8":
        fields |= {"hidden_states": fields["hidden_states"] or "all", "embeddings": False, "routed_experts": None}
    if not any(fields[name] for name in ("hidden_states", "embeddings", "routed_experts")):
        fields["embeddings"] = True
    named = st.sampled_from(NAMED_POSITIONS) | st.lists(st.integers(-9, 9), min_size=1).map(tuple)
    return Wish(fields, draw(st.one_of(st.none(), TREE, GENERATED)), draw(named))


def prompts_of(draw: random.Random, count: int) -> list[Prompt]:
    """Return so many prompts, some with several completions."""

    def tokens(most: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, most))]

    return [Prompt(str(n), tokens(12), [tokens(9) for _ in range(draw.choice((1, 1, 1, 3)))]) for n in range(count)]


def places(sample: Any) -> Iterator[tuple[str, int]]:
    """Yield the streams and layers that a sample has."""
    for name, layers in sample._capture.layers.items():
        yield from ((name, layer) for layer in layers)


def rows_of(sample: Any, stream: str, layer: int) -> torch.Tensor:
    """Return the rows of a sample."""
    return sample._layers(stream)[layer]


def bits(rows: torch.Tensor) -> bytes:
    """Return the bytes of a tensor."""
    return rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def check(parts: list[Any], wish: Wish, whole: Any) -> None:
    """Compare a sample, perhaps in parts, with what its Spec makes of all rows of its sequence."""
    tokens = whole.token_ids.tolist()
    at = wish.at(tokens, len(whole.output.prompt_token_ids))
    for part in parts:
        assert sorted(places(part)) == sorted(wish.places)
    for place in wish.places:
        right, found = wish.of(whole, at, *place), torch.cat([rows_of(part, *place) for part in parts])
        assert found.dtype == right.dtype
        assert found.shape == right.shape
        assert bits(found) == bits(right)
    kept = at if wish.spec.reduce is None else at[-1:]
    assert torch.cat([part.positions for part in parts]).tolist() == kept
    assert torch.cat([part.token_ids for part in parts]).tolist() == [tokens[position] for position in kept]


def check_whole(whole: Any, name: str, engine: HostEngine) -> None:
    """Compare the rows of a sequence that was taken as a whole with those that were made."""
    assert whole.positions.tolist() == list(range(len(whole)))
    for place in places(whole):
        rows = rows_of(whole, *place).contiguous().view(torch.uint8).numpy()
        for position, row in enumerate(rows):
            assert row.tobytes() == engine.truth[place[0], name, place[1], position]


class Client:
    """A client with some of the samples, which takes their rows in one of three ways.

    Attributes:
        found: {(sample, completion): what it got}, each a list of one sample or of blocks.
        handed_out: {sample: (first position, position behind the last, all rows by then) of each block}. The rows of a
            block stay as they are where its request is preempted later.
    """

    def __init__(self, engine: HostEngine, specs: Any, mine: dict[int, Prompt], how: str) -> None:
        self.engine = HostClient(engine)
        self._recording = Recording(self.engine, specs)
        self._specs, self._mine, self._how = specs, mine, how
        self._collector = Collector(self._recording)
        self._sent, self._truth = dict.fromkeys(mine, 0), engine.truth
        self.found: dict[tuple[int, int], list[Any]] = {}
        self.handed_out: dict[int, list[tuple[int, int, Any]]] = {}
        for sample, prompt in mine.items():
            params = self._recording.mark(SimpleNamespace(**PARAMS, n=len(prompt.requests)), sample)
            for request in prompt.requests:
                request.params.append((self.engine, params))

    def look(self) -> None:
        """Take what there is, between steps."""
        if self._how != "at the end":
            self._collector.take()
        if self._how == "rows":
            for sample, prompt in self._mine.items():
                if self._comes_in_blocks(sample) and prompt.requests[0].generated:
                    self._take_block(sample, prompt.output())

    def _comes_in_blocks(self, sample: int) -> bool:
        spec = self._specs[sample]
        return len(self._mine[sample].requests) == 1 and not (spec.needs_end or spec.reduce)

    def _take_block(self, sample: int, output: Any) -> None:
        begin, end = self._sent[sample], len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1
        self._sent[sample] = end
        self.handed_out.setdefault(sample, []).append((begin, end, dict(self._truth)))
        block = self._collector.rows_until(sample, output, begin, end)
        self.found.setdefault((sample, 0), []).append(block.sample(0))

    def end(self, num_samples: int) -> None:
        """Take what is left."""
        self.look()
        if self._how == "at the end":
            outputs = [self._mine[n].output() if n in self._mine else None for n in range(num_samples)]
            result = self._recording.finish(outputs)
            self.found = {(n, c): [result.sample(n, c)] for n in self._mine for c in self._completions(n)}
            return
        for sample, prompt in self._mine.items():
            if (sample, 0) not in self.found:
                alone = self._collector.result(sample, prompt.output())
                self.found |= {(sample, c): [alone.sample(0, c)] for c in self._completions(sample)}
            self._collector.drop(sample)  # what came of it behind its end
        assert not self._collector.held_bytes

    def _completions(self, sample: int) -> range:
        return range(len(self._mine[sample].requests))


def as_handed_out(whole: Any, blocks: list[tuple[int, int, Any]], request: str) -> Any:
    """Return a sequence with the rows that there were when blocks of it were handed out."""

    def layers(stream: str) -> dict[int, torch.Tensor]:
        rows = {layer: rows_of(whole, stream, layer).clone() for name, layer in places(whole) if name == stream}
        for begin, end, truth in blocks:
            for layer, tensor in rows.items():
                for position in range(begin, end):
                    row = truth[stream, request, layer, position]
                    tensor[position] = torch.frombuffer(bytearray(row), dtype=tensor.dtype)
        return rows

    return SimpleNamespace(_layers=layers, token_ids=whole.token_ids, output=whole.output)


def check_memory(client: Client, foreign: list[Any]) -> None:
    """Look for rows of foreign samples in all that a client may map, byte by byte."""
    rows = [row for sample in foreign for row in rows_of(sample, "hidden_states", 1)]
    memory = client.engine.memory()
    assert not [row for row in rows for part in memory if row.view(torch.uint8).numpy().tobytes() in part]


@settings(max_examples=50)
@given(
    st.lists(wishes(), min_size=3, max_size=5),
    st.sampled_from(["at the end", "samples", "rows"]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_rows_are_those_of_everything_chosen_afterwards(chosen: list[Wish], how: str, drafts: bool, seed: int) -> None:
    """Handed over at the end, by sample or as they come; no memory of a client has a row of another's request."""
    draw = random.Random(seed)
    engine, prompts = HostEngine(draw, drafts), dict(enumerate(prompts_of(draw, 5)))
    wish_of = [draw.choice(chosen) for _ in prompts]
    specs = [wish.spec for wish in wish_of]
    first = {sample: prompt for sample, prompt in prompts.items() if draw.random() < 0.6}
    second = {sample: prompt for sample, prompt in prompts.items() if sample not in first}
    everything = Client(engine, [EVERYTHING] * len(prompts), prompts, "at the end")
    clients = [Client(engine, specs, mine, how) for mine in (first, second)]
    for _ in engine.run([request for prompt in prompts.values() for request in prompt.requests]):
        if draw.random() < 0.3:
            draw.choice(clients).look()
    everything.end(len(prompts))
    whole = {slot: sample for slot, (sample,) in everything.found.items()}
    for (sample, completion), rows in whole.items():
        check_whole(rows, prompts[sample].requests[completion].name, engine)
    for client, foreign in zip(clients, (second, first), strict=True):
        client.end(len(prompts))
        assert {sample for sample, _ in client.found} == set(prompts) - set(foreign)
        for slot, parts in client.found.items():
            request = prompts[slot[0]].requests[slot[1]].name
            then = as_handed_out(whole[slot], client.handed_out.get(slot[0], []), request)
            check(parts, wish_of[slot[0]], then)
        check_memory(client, [rows for slot, rows in whole.items() if slot[0] in foreign])
    for client in (everything, *clients):
        client.engine.close()
