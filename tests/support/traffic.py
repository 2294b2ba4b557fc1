"""Random requests in every scheduling state, captured by several clients and plain, beside an engine; test process.

A round has some captures that overlap, or a stream. Plain requests, and captured ones of captures that were stopped,
live on into the next round, as do the rows of the last captures: they are checked when the memory of later ones could
have overwritten them.
"""

from __future__ import annotations

import collections
import faulthandler
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from draws import BLOCK_SIZE, EVERYTHING, MAX_MODEL_LEN, Draws
from shadow import Completion, Joined, Shadow, completions
from vllm_tap import Recording, Spec, Tap
from vllm_tap.client.connection import Connection, connect
from vllm_tap.errors import TapError
from vllm_tap.spec import begin_of

HANG_S = 300
"""An engine that gives no outputs for so long ends the process, with a traceback."""

MOST_CLIENTS = 3
"""Beside the engine's own."""

LATEST_START = 60
"""Steps after which the last capture of a round has begun."""


@dataclass
class Request:
    """A request that the engine has and that has not finished; `capture` is None for a plain one."""

    prompt: list[int]
    params: Any
    capture: UnderWay | None = None
    sample: int = 0
    twin: str | None = None


@dataclass
class UnderWay:
    """A capture under way: requests that have not been added, and names of those that have and are not finished."""

    recording: Recording
    client: Any
    outputs: list[Any] = field(default_factory=list)
    waiting: list[tuple[str, Request]] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    steps_left: int | None = None

    @property
    def is_done(self) -> bool:
        """True if all requests have finished."""
        return not self.waiting and not self.open


class Traffic:
    """Rounds of random requests on one engine; everything is drawn from one seed."""

    def __init__(
        self, llm: Any, shadow: Shadow, tokens_per_step: int, requests: int, limits: Sequence[int], seed: int
    ) -> None:
        self.engine, self.llm, self.shadow = llm.llm_engine, llm, shadow
        self.tokens_per_step, self.requests = tokens_per_step, requests
        self.draws = Draws(seed, limits)
        self.met: collections.Counter[str] = collections.Counter()
        self.seconds: collections.Counter[str] = collections.Counter()
        self.alive: dict[str, Request] = {}
        self.cached: dict[str, int] = {}
        self.clients: list[Connection] = []
        self.unchecked: list[Any] = []
        self.number = 0

    def round(self) -> None:
        """Run some captures, or a stream, over random traffic, and check those before."""
        begin = time.monotonic()
        ended = self.stream() if self.draws.chance(0.1) else self.overlap()
        middle = time.monotonic()
        self.check_last()
        self.unchecked = ended
        self.seconds.update(generate=middle - begin, check=time.monotonic() - middle)

    # -------------------------------------------------------------------------------------------- captures that overlap

    def overlap(self) -> list[Any]:
        """Run captures of several clients, which begin and end beside one another; return their results."""
        draws = self.draws
        num_captures = draws.one(1, 1, 2, 3, 4)
        starts = [0, *sorted(draws.random.randrange(LATEST_START) for _ in range(num_captures - 1))]
        running: list[UnderWay] = []
        ended = []
        burst = draws.one(1, 4, self.requests)
        for now in itertools.count():
            while starts and starts[0] <= now:
                del starts[0]
                self.met["captures beside others"] += bool(running)
                running.append(self.begin(self.requests // num_captures))
            for each in running:
                for _ in range(min(len(each.waiting), draws.random.randint(0, burst))):
                    self.add(*each.waiting.pop())
            self.step()
            for each in [each for each in running if each.is_done or each.steps_left == 0]:
                running.remove(each)
                ended += self.end(each)
            for each in running:
                each.steps_left = None if each.steps_left is None else each.steps_left - 1
            if not running and not starts:
                return ended
        raise AssertionError

    def begin(self, num_requests: int, steps_left: int | None = None) -> UnderWay:
        """Begin a capture of one of the clients, and draw its requests and plain ones; the last is added first."""
        draws = self.draws
        client = self.client()
        transport = "inline" if client is self.llm and draws.chance(0.1) else "auto"
        specs = draws.specs(num_requests)
        under_way = UnderWay(Recording(client, specs, transport=transport), client)
        if draws.chance(0.04):
            under_way.steps_left = draws.random.randrange(40)
        for _ in range(num_requests):
            under_way.waiting += self.drawn(under_way)
        self.met["captures"] += 1
        self.met["captures through calls"] += transport == "inline"
        self.met["captures of other clients"] += client is not self.llm
        self.met["captures of some rows or layers"] += specs != EVERYTHING
        self.met["captures with a Spec for each sample"] += isinstance(specs, list)
        return under_way

    def client(self) -> Any:
        """Return the engine, whose client this process is, or another client of it."""
        if self.draws.chance(0.5):
            return self.llm
        if len(self.clients) < MOST_CLIENTS or self.draws.chance(0.1):
            self.met["clients"] += 1
            self.clients = [*self.clients, Connection.at(connect(self.llm).addresses)][-MOST_CLIENTS:]
        return self.draws.one(*self.clients)

    def drawn(self, under_way: UnderWay) -> list[tuple[str, Request]]:
        """Return a request, perhaps one that is not captured, perhaps with a plain twin."""
        prompt = self.draws.prompt()
        params = self.draws.params(len(prompt))
        name, self.number = f"soak-{self.number}", self.number + 1
        if self.draws.chance(0.12):
            return [(name, Request(prompt, params))]
        sample = len(under_way.outputs)
        under_way.outputs.append(None)
        captured = Request(prompt, under_way.recording.mark(params, sample), under_way, sample)
        if len(prompt) > BLOCK_SIZE and self.draws.chance(0.15):
            # A plain request of the same prompt, right in front: what it finds in the cache the other would find.
            captured.twin = f"{name}-twin"
            return [(name, captured), (captured.twin, Request(prompt, params))]
        return [(name, captured)]

    def add(self, name: str, request: Request) -> None:
        """Give a request to the engine."""
        self.engine.add_request(name, {"prompt_token_ids": request.prompt}, request.params)
        self.alive[name] = request
        if request.capture is not None:
            request.capture.open.add(name)

    def step(self) -> None:
        """Wait for the next outputs, if the engine has anything to do, and perhaps abort a request."""
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        for output in self.engine.step() if self.engine.has_unfinished_requests() else ():
            if output.finished:
                self.take(output)
        if self.alive and self.draws.chance(0.01):
            victim = self.draws.one(*sorted(self.alive))
            self.engine.abort_request([victim])
            request = self.alive.pop(victim)
            self.met["aborts of plain requests" if request.capture is None else "aborts"] += 1
            if request.capture is not None:
                request.capture.open.discard(victim)

    def take(self, output: Any) -> None:
        """Keep a finished output."""
        request = self.alive.pop(output.request_id)
        self.cached[output.request_id] = output.num_cached_tokens
        if request.capture is None:
            self.met["plain requests"] += 1
            self.met["prefix hits of plain requests"] += output.num_cached_tokens > 0
        elif output.request_id in request.capture.open:
            request.capture.open.remove(output.request_id)
            request.capture.outputs[request.sample] = output
            self.count(request, output, request.capture.recording.wishes.of(request.sample))

    def count(self, request: Request, output: Any, spec: Spec) -> None:
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
        first_wanted = begin_of(spec.positions).of(len(request.prompt))
        self.met["prefix hits too long"] += output.num_cached_tokens > min(first_wanted, len(request.prompt) - 1)
        self.count_spec(spec)

    def count_spec(self, spec: Spec) -> None:
        """Count what a sample was asked for by."""
        self.met["samples of one row"] += spec.reduce is not None
        self.met["samples of another dtype"] += spec.dtype is not None
        self.met["samples by an expression"] += not isinstance(spec.positions, str | tuple)

    def end(self, under_way: UnderWay) -> list[Any]:
        """Finish or stop a capture, or let its client go; a refusal to finish means that rows are lost or wrong."""
        recording = under_way.recording
        if not under_way.is_done and under_way.client is not self.llm and self.draws.chance(0.5):
            for reader in under_way.client.ways.readers().values():
                reader.close()  # with all of its captures, of which this process has no other
            self.clients.remove(under_way.client)
            self.met["clients gone"] += 1
            return []
        if not under_way.is_done:
            recording.stop()
            self.met["captures stopped"] += 1
            return []
        return self.attempt(lambda: [recording.finish(under_way.outputs)])

    def attempt(self, run: Callable[[], list[Any]]) -> list[Any]:
        """Return what a function does; one that fails has lost rows, or let go of them."""
        try:
            return run()
        except TapError as error:
            print(f"FAILED capture {self.met['captures']}: {type(error).__name__}: {error}", flush=True)
            self.met["captures failed"] += 1
            return []

    # ---------------------------------------------------------------------------------------------------------- streams

    def stream(self) -> list[Any]:
        """Read a stream to its end, or leave it, while another client's capture waits for its end; check it at once."""
        self.finish_all()  # a stream takes an engine without requests
        self.check_last()  # rows of captures before count in the budget
        beside = self.begin(4)
        beside.steps_left = None
        for request in beside.waiting:
            self.add(*request)
        beside.waiting.clear()
        self.finish_all()
        num_prompts = self.draws.random.randint(1, self.requests // 2)
        leave_at = self.draws.random.randrange(num_prompts) if self.draws.chance(0.2) else None
        by_rows = self.draws.chance(0.4)
        self.met["streams of rows" if by_rows else "streams of samples"] += 1
        self.met["streams left"] += leave_at is not None
        run = self.rows_of_stream if by_rows else self.samples_of_stream
        self.attempt(lambda: run([self.draws.prompt() for _ in range(num_prompts)], leave_at))
        return self.end(beside)

    def terms(self, prompts: Sequence[list[int]], by_rows: bool) -> dict[str, Any]:
        """Return arguments of a stream."""
        longest = max(map(len, prompts))
        return {
            "prompts": ({"prompt_token_ids": prompt} for prompt in prompts),
            "spec": self.draws.specs(len(prompts), reduces=not by_rows),
            "sampling_params": self.draws.params(longest, most_completions=1 if by_rows else 3),
            "budget_bytes": self.draws.one(None, 48 << 20),
        }

    def samples_of_stream(self, prompts: Sequence[list[int]], leave_at: int | None) -> list[Any]:
        """Check the samples of a stream, each as it comes: a stream whose samples are kept does not fit its budget."""
        met: list[tuple[int, int]] = []
        terms = self.terms(prompts, False)
        with Tap(self.llm).stream(**terms) as stream:
            for number, sample in enumerate(stream):
                met.append((sample.index, sample.completion))
                self.shadow.check_samples([(completion_of(sample), sample)])
                if number == leave_at:
                    break
        if leave_at is None:
            every = [(index, n) for index in range(len(prompts)) for n in range(terms["sampling_params"].n)]
            self.require(sorted(met) == every, "samples of a stream")
        return []

    def rows_of_stream(self, prompts: Sequence[list[int]], leave_at: int | None) -> list[Any]:
        """Check the rows of a stream, put together as soon as a sequence has ended."""
        blocks: dict[int, list[Any]] = {}
        num_ended = 0
        with Tap(self.llm).stream_rows(**self.terms(prompts, True)) as stream:
            for block in stream:
                blocks.setdefault(block.index, []).append(block)
                if block.finished:
                    num_ended += 1
                    self.shadow.check_samples([(completion_of(block), Joined(blocks.pop(block.index)))])
                if leave_at is not None and num_ended > leave_at:
                    break
        if leave_at is None:
            self.require(num_ended == len(prompts), "sequences of a stream")
        return []

    def require(self, condition: bool, what: str) -> None:
        """Count a capture as failed where a condition does not hold."""
        if not condition:
            print(f"FAILED: {what}: some are lost or doubled", flush=True)
            self.met["captures failed"] += 1

    # ------------------------------------------------------------------------------------------------------------ ends

    def check_last(self) -> None:
        """Check the rows of the captures before, and let go of them."""
        for result in self.unchecked:
            self.shadow.check(result)
        self.unchecked = []

    def finish_all(self) -> None:
        """Let all requests end."""
        while self.engine.has_unfinished_requests():
            self.step()
        self.alive.clear()

    def drain(self) -> None:
        """Check what is left, and let all requests end."""
        self.check_last()
        self.finish_all()
        faulthandler.cancel_dump_traceback_later()


def completion_of(sample: Any) -> Completion:
    """Return the tokens of a sample of a stream, which has ended."""
    (found,) = [each for each in completions([sample.output]) if each.number == sample.completion]
    return found._replace(sample=sample.index)
