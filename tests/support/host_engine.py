"""An engine without vLLM: random steps over requests, with the worker's and the client's own code around them.

Runs in the test process. Rows follow from the tokens before them, so that any of them can be told on its own; steps
are what a scheduler may do: chunks, prefix hits, preemption, drafts that are rejected, rows past the end.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from vllm_tap import Recording, Spec
from vllm_tap.client.connection import Connection, HandedOver
from vllm_tap.client.memory import FetchedMemory, by_calls
from vllm_tap.client.ways import Ways
from vllm_tap.engine.capture.cpu import CpuBackend
from vllm_tap.engine.capture.session import Session
from vllm_tap.engine.model.tap import Tap, tap
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream
from vllm_tap.labels import Mark, read_mark
from vllm_tap.positions import Begin
from vllm_tap.vllm.runner import Batch

NUM_LAYERS = 4
WIDTH = 3
EVERY = tuple(range(NUM_LAYERS))
PLACES = {
    "hidden_states": (torch.bfloat16, EVERY),
    "attention_output": (torch.float32, EVERY),
    "mlp_output": (torch.float16, EVERY),
    "embeddings": (torch.float32, (0,)),
    "final_hidden_states": (torch.float32, (NUM_LAYERS - 1,)),
}
BUDGET = 4 << 20


def states(token_ids: Sequence[int], begin: int = 0) -> npt.NDArray[np.int64]:
    """Return a number for each token from `begin` on, which follows from it and all before it: [T]."""
    return np.array([hash(tuple(token_ids[:end])) >> 8 for end in range(begin + 1, len(token_ids) + 1)], np.int64)


def rows(stream: str, layer: int, of: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return the rows of a place behind some tokens: whole numbers below 128, which all dtypes hold, [T, 3]."""
    dtype, layers = PLACES[stream]
    place = 1 + 2 * (list(PLACES).index(stream) * NUM_LAYERS + layers.index(layer))
    return torch.from_numpy((of[:, None] * place >> np.array([0, 7, 14])) % 128).to(dtype)


@dataclass
class Running:
    """A request that runs: its tokens that enter the model, and how many of them have."""

    name: str
    mark: Mark
    prompt_len: int
    tokens: list[int]
    computed: int = 0
    known: int = 0  # tokens that were computed before it was preempted
    ahead: int = 0  # drafts that the host counts as computed

    @property
    def most_cached(self) -> int:
        """Tokens that it may find in the prefix cache."""
        bound = self.mark.reads_cache
        return 0 if bound is None else min(Begin(*bound).of(self.prompt_len), self.prompt_len - 1)


@dataclass
class Params:
    """The fields of sampling parameters that marks are about."""

    n: int = 1
    max_tokens: int = 9
    extra_args: dict[str, Any] | None = None
    skip_reading_prefix_cache: bool = False


class HostEngine(Connection):
    """An engine, and the connection to it.

    Args:
        seed: Of its steps.
        drafts: Whether it decodes speculatively.
    """

    def __init__(self, seed: int, drafts: bool) -> None:
        self.random, self.drafts = random.Random(seed), drafts
        self.backend = CpuBackend()
        self.pool = self.backend.new_pool(shared=False)
        self.taps = {
            (stream, layer): Tap(stream, layer, self.backend.rows, torch.device("cpu"), dtype)
            for stream, (dtype, layers) in PLACES.items()
            for layer in layers
        }
        self.sessions: dict[str, Session] = {}
        self.running: list[Running] = []
        streams = tuple(
            messages.StreamInfo(name, str(dtype).removeprefix("torch."), WIDTH, layers, "made up")
            for name, (dtype, layers) in PLACES.items()
        )
        hello: Any = SimpleNamespace(streams=streams, residual="hidden", reasons={}, num_layers=NUM_LAYERS)
        self.hellos, self.routing, self.routing_versions = [hello], {}, {0: 0}
        self.ways, self._under_way = Ways(), {}
        for each in self.taps:
            self._pass(each, torch.zeros(1, WIDTH, dtype=PLACES[each[0]][0]))

    def _pass(self, place: tuple[str, int], tensor: torch.Tensor) -> None:
        tap(tensor, None, self.taps[place].control)

    # ------------------------------------------------------------------------------------------------ as a connection

    def choose_transport(self, transport: str) -> str:
        """Rows cross in calls, which are functions here."""
        return ""

    def ask(self, kind: Any, call: Any, way: str) -> Callable[[], list[Any]]:
        """Begin or stop a capture."""
        if isinstance(call, messages.Stop):
            session = self.sessions.pop(call.capture_id)
            session.close()
            session.release()
            return lambda: []
        streams = [
            Stream(name, str(PLACES[name][0]).removeprefix("torch."), WIDTH, layers)
            for name, layers in call.streams.items()
        ]
        sink = self.backend.new_sink(streams, self.taps, {}, self.pool, "auto")
        account = self.pool.open_account(call.budget_bytes)
        self.sessions[call.capture_id] = Session(call, 0, streams, sink, account, self.drafts)
        return lambda: []

    def hand_over(self, call: Any, way: str) -> Callable[[], HandedOver]:
        """Hand over what a capture has, in copies."""
        is_end = isinstance(call, messages.Finish)
        session = self.sessions.pop(call.capture_id) if is_end else self.sessions[call.capture_id]
        blocks = session.block_ids
        descriptor = session.finish() if is_end else session.take()
        memory = FetchedMemory(descriptor, descriptor.validate(call.capture_id, sys.byteorder), by_calls(self._fetch))
        if is_end:
            session.close()
        for block_id in blocks:
            self.pool.release(block_id)
        return lambda: [(descriptor, memory)]

    def _fetch(self, segment_id: int, offset: int, nbytes: int) -> bytes:
        return bytes(self.pool.segment(segment_id).view[offset : offset + nbytes])

    # ---------------------------------------------------------------------------------------------------- as an engine

    def add(self, output: Any, params: Any) -> None:
        """Take requests that will have this output: one for each completion."""
        mark = read_mark(params.extra_args)
        assert mark is not None
        for completion in output.outputs:
            name = f"{completion.index}_{output.request_id}" if params.n > 1 else output.request_id
            tokens = [*output.prompt_token_ids, *completion.token_ids[:-1]]
            request = Running(f"{name}-{self.random.randrange(99)}", mark, len(output.prompt_token_ids), tokens)
            self._begin(request)
            self.running.append(request)

    @property
    def known(self) -> dict[int, int]:
        """Tokens of each sample whose rows are final; of samples of one completion that run."""
        return {request.mark.sample: request.known for request in self.running}

    def _begin(self, request: Running) -> None:
        request.computed, request.ahead = self.random.randint(0, request.most_cached), 0

    def run(self, most_tokens: int) -> Iterator[None]:
        """Run steps of so many tokens at most, each in a pause of the caller's, until all requests have ended."""
        while self.running:
            for request in self.running:
                if self.random.random() < 0.04:  # preempted
                    self._begin(request)
            scheduled = self.random.sample(self.running, self.random.randint(1, len(self.running)))
            counts = []
            for request in scheduled:
                counts.append(self._count(request, most_tokens - sum(counts)))
            self._step([(each, count) for each, count in zip(scheduled, counts, strict=True) if count])
            self.running = [each for each in self.running if each.computed < len(each.tokens)]
            yield

    def _count(self, request: Running, room: int) -> int:
        left = request.prompt_len - request.computed
        if left > 0:
            return min(self.random.randint(1, left), room)
        # A step past the end: the token that ends a sequence is not known when it is scheduled.
        return min(1 + (self.random.randint(0, 3) if self.drafts else 0), room)

    def _step(self, scheduled: list[tuple[Running, int]]) -> None:
        """Run a step: tokens behind the end of a prompt are the next one and drafts, of which some are right."""
        if not scheduled:
            return
        tokens = [self._tokens(request, count) for request, count in scheduled]
        starts = np.cumsum([0, *(count for _, count in scheduled)]).astype(np.int32)
        positions = np.concatenate([request.computed + np.arange(count) for request, count in scheduled])
        ids = [
            token for (request, _), mine in zip(scheduled, tokens, strict=True) for token in mine[request.computed :]
        ]
        told = np.array([request.computed + request.ahead for request, _ in scheduled], np.int32)
        names = [request.name for request, _ in scheduled]
        batch = Batch(names, starts, told, torch.from_numpy(positions), torch.tensor(ids, dtype=torch.int32))
        for request, _ in scheduled:
            for session in self.sessions.values():  # again after preemption, as the V2 runner does
                session.meet(request.name, request.mark, request.prompt_len)
        for session in self.sessions.values():
            session.before_forward(batch)
        parts = [states(mine, request.computed) for (request, _), mine in zip(scheduled, tokens, strict=True)]
        for place in self.taps:
            self._pass(place, rows(*place, np.concatenate(parts)))
        for session in self.sessions.values():
            session.after_forward()
            session.after_sampling()
        for (request, count), mine in zip(scheduled, tokens, strict=True):
            self._advance(request, count, mine)

    def _tokens(self, request: Running, count: int) -> list[int]:
        """Return the tokens of a request up to the end of a step; those that nobody knows yet are drafts."""
        end = request.computed + count
        tokens = request.tokens[:end]
        first_draft = max(request.computed + 1, request.prompt_len)
        for position in range(first_draft, end):
            if position >= len(tokens):
                tokens.append(self.random.randrange(3, 9))
            elif self.random.random() < 0.4:
                tokens[position] = self.random.randrange(3, 9)
        return tokens

    def _advance(self, request: Running, count: int, tokens: list[int]) -> None:
        end = request.computed + count
        right = request.tokens[:end]
        accepted = next((n for n, (a, b) in enumerate(zip(tokens, right, strict=False)) if a != b), len(right))
        request.ahead = end - accepted if self.drafts else 0
        request.computed, request.known = accepted, max(request.known, accepted)


def outputs_of(draws: random.Random, num_prompts: int, most_completions: int = 3) -> list[Any]:
    """Return what prompts of a few tokens will generate."""
    found = []
    for number in range(num_prompts):
        completions = [
            SimpleNamespace(index=index, token_ids=[draws.randrange(3, 9) for _ in range(draws.randint(1, 9))])
            for index in range(draws.randint(1, most_completions))
        ]
        prompt = [draws.randrange(3, 9) for _ in range(draws.choice((1, 2, 5, 12)))]
        found.append(SimpleNamespace(request_id=f"r{number}", prompt_token_ids=prompt, outputs=completions))
    return found


def recording_of(engine: HostEngine, specs: Spec | list[Spec], outputs: Sequence[Any]) -> Recording:
    """Begin a capture, and add the requests that will have these outputs; None for samples that are not to be."""
    recording = Recording(engine, specs, budget_bytes=BUDGET)
    for sample, output in enumerate(outputs):
        if output is not None:
            engine.add(output, recording.mark(Params(n=len(output.outputs)), sample))
    return recording
