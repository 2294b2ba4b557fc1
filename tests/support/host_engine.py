"""An engine of random rows in this process, and clients of it: all that chooses rows, without a model or vLLM.

A scheduler that draws all it does cuts prompts, preempts, drafts, rejects, and runs steps beyond the end. Every row is
random, so that a row of another token, layer or attempt is another row.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_tap.client.connection import Connection, HandedOver
from vllm_tap.client.memory import FetchedMemory, by_calls
from vllm_tap.engine.capture.cpu import CpuSink
from vllm_tap.engine.capture.session import Session
from vllm_tap.engine.model.tap import Rows, Tap, tap
from vllm_tap.frame import messages
from vllm_tap.frame.layout import Stream
from vllm_tap.labels import read_mark
from vllm_tap.transport.segment.pool import SegmentPool
from vllm_tap.vllm.runner import Batch

NUM_LAYERS = 3
VOCABULARY = 6
INFOS = (
    messages.StreamInfo("hidden_states", "bfloat16", 6, (0, 1, 2), ""),
    messages.StreamInfo("embeddings", "bfloat16", 6, (0,), ""),
    messages.StreamInfo("expert_ids", "uint8", 2, (1,), ""),
    messages.StreamInfo("expert_weights", "float32", 2, (1,), ""),
)
BUDGET = 1 << 20

ROWS: Rows[Any] = Rows()
TAPS = {
    (info.name, layer): Tap(info.name, layer, ROWS, torch.device("cpu"), getattr(torch, info.dtype))
    for info in INFOS
    for layer in info.layers
}
Truth = dict[tuple[str, str, int, int], bytes]
"""Bytes of the row that came last, by stream, request, layer and position."""


class Piece(NamedTuple):
    """Tokens of a request in a step, from a position; `gained` more are known after it, of drafts some `rejected`."""

    tokens: list[int]
    begin: int
    gained: int
    rejected: int


class Request:
    """A sequence that the engine generates.

    Attributes:
        name: In the engine.
        token_ids: Of the prompt and of all that will be generated.
        known: Tokens that the scheduler knows.
        computed: Tokens whose rows are in the cache.
        ahead: Drafts that the host takes for accepted and the device does not, as under asynchronous scheduling.
        params: Of each client that captures it, marked by that.
    """

    def __init__(self, name: str, prompt: list[int], generated: list[int]) -> None:
        self.name, self.prompt_len, self.token_ids = name, len(prompt), prompt + generated
        self.known, self.computed, self.ahead = len(prompt), 0, 0
        self.params: list[tuple[HostClient, Any]] = []

    @property
    def is_done(self) -> bool:
        """True when all tokens are known."""
        return self.known == len(self.token_ids)

    def drawn(self, draw: random.Random, drafts: bool) -> Piece:
        """Return its next piece."""
        if self.is_done:
            return Piece([0], len(self.token_ids) - 1, 0, 0)
        pending = self.token_ids[self.computed : self.known]
        if len(pending) > 1 and draw.random() < 0.6:
            pending = pending[: draw.randint(1, len(pending))]
        if self.computed + len(pending) < self.known:
            return Piece(pending, self.computed, 0, 0)
        num_drafts = draw.randint(0, 3) if drafts and len(pending) == 1 else 0
        right = self.token_ids[self.known : self.known + num_drafts]
        given = [token if draw.random() < 0.6 else draw.randrange(VOCABULARY) for token in right]
        accepted = next((n for n, (a, b) in enumerate(zip(given, right, strict=True)) if a != b), len(given))
        gained = min(accepted + 1, len(self.token_ids) - self.known)
        return Piece(pending + given, self.computed, gained, len(given) - accepted)

    def take(self, piece: Piece) -> None:
        """Go on behind a piece."""
        if not self.is_done:
            self.known += piece.gained
            self.computed = self.known - 1 if piece.gained else self.computed + len(piece.tokens)
            self.ahead = piece.rejected

    def preempt(self) -> None:
        """Lose all rows: they come again."""
        self.computed = self.ahead = 0

    @property
    def generated(self) -> list[int]:
        """The tokens that are known behind the prompt."""
        return self.token_ids[self.prompt_len : self.known]


class HostEngine:
    """Requests, and steps that take some of them further."""

    def __init__(self, draw: random.Random, drafts: bool) -> None:
        self._draw, self.drafts = draw, drafts
        self.clients: list[HostClient] = []
        self.requests: dict[str, Request] = {}
        self.truth: Truth = {}

    def run(self, requests: list[Request]) -> Iterator[None]:
        """Run steps until all have ended; yield after each."""
        waiting, running = list(requests), []
        while waiting or running:
            while waiting and (not running or self._draw.random() < 0.5):
                running.append(waiting.pop(0))
                for client, params in running[-1].params:
                    client.meet(running[-1], params)
            self._step([one for one in running if self._draw.random() < 0.8] or running[:1])
            for one in running:
                if self._draw.random() < 0.05:
                    one.preempt()
            ended = [one for one in running if one.is_done]
            running = [one for one in running if not one.is_done]
            if ended and self._draw.random() < 0.5:
                self._step(ended)  # an asynchronous step that nobody wants any more
            yield

    def _step(self, requests: list[Request]) -> None:
        pieces = [one.drawn(self._draw, self.drafts) for one in requests]
        positions = np.concatenate([piece.begin + np.arange(len(piece.tokens)) for piece in pieces])
        names = [one.name for one in requests]
        batch = Batch(
            names,
            np.cumsum([0, *(len(piece.tokens) for piece in pieces)]).astype(np.int32),
            np.array([piece.begin + one.ahead for one, piece in zip(requests, pieces, strict=True)], np.int32),
            torch.from_numpy(positions),
            torch.tensor([token for piece in pieces for token in piece.tokens], dtype=torch.int32),
        )
        for client in self.clients:
            client.session.before_forward(batch)
        self._forward(np.repeat(names, np.diff(batch.starts)), positions)
        for client in self.clients:
            client.session.after_forward()
            client.session.after_sampling()
        for one, piece in zip(requests, pieces, strict=True):
            one.take(piece)

    def _forward(self, names: Any, positions: Any) -> None:
        infos = {info.name: info for info in INFOS}
        for (stream, layer), place in TAPS.items():
            info = infos[stream]
            drawn = torch.frombuffer(bytearray(self._draw.randbytes(len(names) * info.width)), dtype=torch.uint8)
            rows = drawn.view(len(names), info.width)
            made = rows if stream == "expert_ids" else ((rows.float() - 99) / 7).to(getattr(torch, info.dtype))
            tap(made, None, place.control)
            for name, position, row in zip(names, positions, made.view(torch.uint8).numpy(), strict=True):
                self.truth[stream, str(name), layer, int(position)] = row.tobytes()


class HostClient(Connection):
    """A connection to such an engine; each has one capture, in memory of its own.

    Attributes:
        session: The worker's side of its capture.
        pool: Its memory.
    """

    def __init__(self, engine: HostEngine, files: Path | None = None) -> None:
        self._prepare(None)
        self._host = engine
        self.pool = SegmentPool(BUDGET, shared=False)
        self._met(
            [
                messages.Hello(
                    rank=messages.Rank(0, 0, 1, 0, 1),
                    pid=0,
                    engine="",
                    runner="",
                    device="cpu",
                    num_layers=NUM_LAYERS,
                    streams=INFOS,
                    residual="",
                    reasons={},
                    routing={},
                    wants_rows=0,
                    address="",
                    calls="",
                    refusal="",
                )
            ]
        )
        self._files = files
        engine.clients.append(self)

    session: Session

    def choose_transport(self, transport: str) -> str:
        """Rows go through calls."""
        return ""

    def ask(self, kind: Any, call: Any, way: str) -> Callable[[], Any]:
        """Begin or stop a capture."""
        if isinstance(call, messages.Start):
            streams = [
                Stream(info.name, info.dtype, info.width, layers)
                for info in INFOS
                if (layers := call.streams.get(info.name, ()))
            ]
            sink = CpuSink(streams, TAPS, {}, ROWS, self.pool)
            account = self.pool.open_account(call.budget_bytes)
            self.session = Session(call, 0, streams, sink, account, self._host.drafts)
        return list

    def meet(self, request: Request, params: Any) -> None:
        """A request is scheduled."""
        mark = read_mark(params.extra_args)
        assert mark is not None
        self.session.meet(request.name, mark, request.prompt_len)

    def hand_over(self, call: Any, way: str) -> Callable[[], HandedOver]:
        """Copy what a session describes, and free it."""

        def take() -> HandedOver:
            is_end = isinstance(call, messages.Finish)
            descriptor = self.session.finish() if is_end else self._taken()
            placed = descriptor.validate(call.capture_id, sys.byteorder)
            fetch = by_calls(lambda number, start, n: bytes(self.pool.segment(number).view[start : start + n]))
            memory = FetchedMemory(descriptor, placed, fetch)
            for chunk in descriptor.chunks:
                self.pool.release(chunk.block_id)
            return [(descriptor, memory)]

        return take

    def _taken(self) -> messages.Descriptor:
        descriptor, settling, _ = self.session.begin_take()
        settling.wait()
        settling.check()
        return descriptor

    def memory(self) -> list[bytes]:
        """Return the bytes of all its segments, as far as anything was written."""
        arrays = [np.frombuffer(segment.view, np.uint8) for segment in self.pool._segments.values()]
        return [array[: int(np.flatnonzero(array).max(initial=-1)) + 1].tobytes() for array in arrays]

    def close(self) -> None:
        """End it."""
        self.session.close()
        self.pool.close()


class Prompt:
    """A prompt, and the requests that it becomes: one for each completion.

    Attributes:
        name: That its output has.
    """

    def __init__(self, name: str, prompt: list[int], completions: list[list[int]]) -> None:
        self.name = name
        names = [name] if len(completions) == 1 else [f"{number}_{name}" for number in range(len(completions))]
        self.requests = [Request(each, prompt, tokens) for each, tokens in zip(names, completions, strict=True)]

    def output(self) -> Any:
        """Return what vLLM would, with the tokens that are known."""
        first = self.requests[0]
        completions = [
            SimpleNamespace(index=number, token_ids=one.generated, finish_reason="length")
            for number, one in enumerate(self.requests)
        ]
        prompt = first.token_ids[: first.prompt_len]
        return SimpleNamespace(request_id=self.name, prompt_token_ids=prompt, outputs=completions)
