"""Random requests in every scheduling state, captured and plain ones mixed; runs in the test process, beside an engine.

A round is one capture. Plain requests, and captured ones of captures that were stopped, live on into the next round, as
do the rows of the last capture: they are checked when the memory of later ones could have overwritten them.
"""

from __future__ import annotations

import collections
import faulthandler
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shadow import Shadow
from vllm_tap import Positions, Recording, Spec
from vllm_tap.errors import TapError
from vllm_tap.spec import begin_of

MAX_MODEL_LEN = 384
BLOCK_SIZE = 32
NUM_LAYERS = 4
EVERYTHING = Spec(hidden_states="all", attention_output="all", mlp_output="all")
FIRST_ID, LAST_ID = 3, 250
"""Prompts are made of these tokens, none of them special."""

LENGTHS = (1, 2, 7, 31, 32, 33, 64, 120, 200)
LIMITS = {"v1": (1, 2, 9, 40, 90), "v2": (1, 2, 9, 40)}
"""Values of max_tokens by runner. An interpreted step of the V2 runner takes a tenth of a second for each of its
requests, so there most rows are those of prompts."""

HANG_S = 300
"""An engine that gives no outputs for so long ends the process, with a traceback."""


@dataclass
class Request:
    """A request that the engine has and that has not finished; `sample` is its place in the capture, or None."""

    prompt: list[int]
    params: Any
    sample: int | None = None
    twin: str | None = None


@dataclass
class Round:
    """A capture under way."""

    recording: Recording
    spec: Spec
    outputs: list[Any] = field(default_factory=list)
    open: set[str] = field(default_factory=set)


class Traffic:
    """Rounds of random requests on one engine; everything is drawn from one seed."""

    def __init__(
        self, llm: Any, shadow: Shadow, tokens_per_step: int, requests: int, limits: Sequence[int], seed: int
    ) -> None:
        self.engine, self.llm, self.shadow = llm.llm_engine, llm, shadow
        self.tokens_per_step, self.requests, self.limits = tokens_per_step, requests, limits
        self.random = random.Random(seed)
        self.met: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()
        self.prefix = self.tokens(3 * BLOCK_SIZE)
        self.alive: dict[str, Request] = {}
        self.cached: dict[str, int] = {}
        self.unchecked: Any = None
        self.number = 0

    def tokens(self, length: int) -> list[int]:
        """Return random tokens."""
        return [self.random.randint(FIRST_ID, LAST_ID) for _ in range(length)]

    def chance(self, share: float) -> bool:
        """Return True in this share of calls."""
        return self.random.random() < share

    # ------------------------------------------------------------------------------------------------- what is asked

    def prompt(self) -> list[int]:
        """Return a prompt: repeated ones draw drafts, shared beginnings prefix hits, long ones are cut into chunks."""
        kind, length = self.random.random(), self.random.choice(LENGTHS)
        if kind < 0.02:
            return self.tokens(MAX_MODEL_LEN - 1)
        if kind < 0.3:
            return self.prefix + self.tokens(length)
        if kind < 0.6:
            unit = self.tokens(max(2, length // 6))
            return (unit * length)[:length]
        return self.tokens(length)

    def params(self, prompt: list[int]) -> Any:
        """Return sampling parameters that end in one of several ways."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        greedy = self.chance(0.7)
        by_text = self.chance(0.1)
        return SamplingParams(
            n=1 if greedy or self.chance(0.8) else self.random.randint(2, 3),
            max_tokens=min(MAX_MODEL_LEN - len(prompt), self.random.choice(self.limits)),
            temperature=0.0 if greedy else 0.7,
            ignore_eos=self.chance(0.5),
            stop_token_ids=self.random.sample(range(512), 4),
            stop=[chr(self.random.randrange(97, 123)) for _ in range(3)] if by_text else None,
            detokenize=by_text,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def spec(self) -> Spec:
        """Return what a capture asks for: mostly everything, else some streams, layers and positions."""
        if self.chance(0.6):
            return EVERYTHING
        layers = self.random.choice(["all", [0], [-1], sorted(self.random.sample(range(NUM_LAYERS), 2))])
        some = sorted({self.random.randint(-40, 40) for _ in range(5)})
        return Spec(
            hidden_states=layers,
            attention_output=self.random.choice([None, "all", [1]]),
            mlp_output=self.random.choice([None, "all", [-1]]),
            embeddings=self.chance(0.5),
            final_hidden_states=self.chance(0.5),
            positions=self.random.choice(
                ["all", "all", "prompt", "generated", "last", "last_generated", some, self.expression()]
            ),
            missing="skip",
        )

    def expression(self) -> Positions:
        """Return some positions of both parts, but those of some tokens."""
        start = self.random.choice((None, self.random.randint(-40, 40)))
        generated = Positions.generated(self.random.choice((None, 1, -9)), None, self.random.randint(1, 5))
        return (Positions.prompt(start, None, self.random.randint(1, 7)) | generated) - Positions.tokens(self.tokens(9))

    # ------------------------------------------------------------------------------------------------------ one round

    def round(self) -> None:
        """Run one capture over random traffic, and check the one before it."""
        begin = time.monotonic()
        transport = "inline" if self.chance(0.1) else "auto"
        spec = self.spec()
        current = Round(Recording(self.llm, spec, transport=transport), spec)
        waiting = self.ask(current)
        stop_after = self.random.randrange(40) if self.chance(0.04) else None
        burst = self.random.choice((1, 4, self.requests))
        num_steps = 0
        while (waiting or current.open) and num_steps != stop_after:
            for request in (waiting.pop() for _ in range(min(len(waiting), self.random.randint(0, burst)))):
                self.add(current, *request)
            self.step(current)
            num_steps += 1
        generated = time.monotonic()
        result = self.end(current, stopped=num_steps == stop_after)
        finished = time.monotonic()
        self.check_last()
        self.unchecked = result
        self.met["captures"] += 1
        self.met["captures through calls"] += transport == "inline"
        self.met["captures of some rows or layers"] += spec != EVERYTHING
        self.seconds.update(generate=generated - begin, finish=finished - generated, check=time.monotonic() - finished)

    def ask(self, current: Round) -> list[tuple[str, Request]]:
        """Draw the requests of a round; the last is added first."""
        drawn = []
        for _ in range(self.requests):
            prompt = self.prompt()
            params = self.params(prompt)
            name, self.number = str(self.number), self.number + 1
            if self.chance(0.12):
                drawn.append((name, Request(prompt, params)))
                continue
            sample = len(current.outputs)
            current.outputs.append(None)
            captured = Request(prompt, current.recording.mark(params, sample), sample)
            drawn.append((name, captured))
            if len(prompt) > BLOCK_SIZE and self.chance(0.15):
                # A plain request of the same prompt, right in front: what it finds in the cache the other would find.
                captured.twin = f"{name}-twin"
                drawn.append((captured.twin, Request(prompt, params)))
        return drawn

    def add(self, current: Round, name: str, request: Request) -> None:
        """Give a request to the engine."""
        self.engine.add_request(name, {"prompt_token_ids": request.prompt}, request.params)
        self.alive[name] = request
        if request.sample is not None:
            current.open.add(name)

    def step(self, current: Round) -> None:
        """Wait for the next outputs, if the engine has anything to do, and perhaps abort a request."""
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        for output in self.engine.step() if self.engine.has_unfinished_requests() else ():
            if output.finished:
                self.take(current, output)
        if self.alive and self.chance(0.01):
            victim = self.random.choice(sorted(self.alive))
            self.engine.abort_request([victim])
            self.met["aborts" if self.alive.pop(victim).sample is not None else "aborts of plain requests"] += 1
            current.open.discard(victim)

    def take(self, current: Round, output: Any) -> None:
        """Keep a finished output."""
        request = self.alive.pop(output.request_id)
        self.cached[output.request_id] = output.num_cached_tokens
        if request.sample is None:
            self.met["plain requests"] += 1
            self.met["prefix hits of plain requests"] += output.num_cached_tokens > 0
        elif output.request_id in current.open:
            current.open.remove(output.request_id)
            current.outputs[request.sample] = output
            self.count(request, output, begin_of(current.spec.positions).of(len(request.prompt)))

    def count(self, request: Request, output: Any, first_wanted: int) -> None:
        """Count the states that a captured request has been through."""
        reasons = [completion.stop_reason for completion in output.outputs]
        self.met["captured requests"] += 1
        self.met["completions of n > 1"] += len(reasons) if len(reasons) > 1 else 0
        self.met["stop strings"] += sum(isinstance(reason, str) for reason in reasons)
        self.met["stop tokens"] += sum(isinstance(reason, int) for reason in reasons)
        self.met["prompts of one token"] += len(request.prompt) == 1
        self.met["prompts of max_model_len - 1"] += len(request.prompt) == MAX_MODEL_LEN - 1
        self.met["max_tokens=1"] += request.params.max_tokens == 1
        # A lower bound: prompts are also cut where others have taken a part of the step.
        self.met["chunk splits"] += (len(request.prompt) - 1) // self.tokens_per_step
        self.met["prefix hits avoided"] += self.cached.get(request.twin or "", 0) > 0 == output.num_cached_tokens
        self.met["prefix hits taken"] += output.num_cached_tokens > 0
        self.met["prefix hits too long"] += output.num_cached_tokens > min(first_wanted, len(request.prompt) - 1)

    def end(self, current: Round, stopped: bool) -> Any:
        """Finish or stop a capture; a refusal to finish means that rows are lost or wrong."""
        if stopped:
            current.recording.stop()
            self.met["captures stopped"] += 1
            return None
        try:
            return current.recording.finish(current.outputs)
        except TapError as error:
            print(f"FAILED capture {self.met['captures']}: {type(error).__name__}: {error}", flush=True)
            self.met["captures failed"] += 1
            return None

    def check_last(self) -> None:
        """Check the rows of the capture before, and let go of them."""
        if self.unchecked is not None:
            self.shadow.check(self.unchecked)
        self.unchecked = None

    def drain(self) -> None:
        """Check what is left, and let all requests end."""
        self.check_last()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        self.alive.clear()
        faulthandler.cancel_dump_traceback_later()
