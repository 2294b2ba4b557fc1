"""A capture under way: started, fed with marked requests, finished or stopped. Client process.

`capture` is the short way. Use a `Recording` when you drive the engine yourself: mark the parameters of the requests to
capture, add them in any order beside others, run the engine's steps, and finish with the outputs.
"""

from __future__ import annotations

import copy
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from vllm_tap.client import marks, missing
from vllm_tap.client.bounds import AT_THE_END, Spill, read_budget, read_on_full
from vllm_tap.client.connection import Connection, HandedOver, connect, new_capture_id
from vllm_tap.client.layers import resolve, union
from vllm_tap.client.mixed import MixedCapture
from vllm_tap.client.owned import Place, RowSource, SomeRows
from vllm_tap.client.progress import Progress
from vllm_tap.client.rank_rows import RankRows, RowMatcher
from vllm_tap.client.reduced import NOTES, made_of, streams_made, with_one_row_each
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences, TokenArrays
from vllm_tap.client.wishes import Wishes
from vllm_tap.errors import EngineDiedError, SpecError, TapError
from vllm_tap.frame import messages
from vllm_tap.frame.layout import ITEMSIZE, LABEL_BYTES
from vllm_tap.frame.routing import summary
from vllm_tap.labels import NUM_LABELS, mark
from vllm_tap.spec import Spec, begin_of, nearest, plain_positions
from vllm_tap.streams import LAYERED_FIELDS, ROUTER_STREAMS, SINGLE_FIELDS
from vllm_tap.vllm import frontend

STAGINGS: Final = ("auto", "staged", "direct")


class Recording:
    """A capture under way in an engine, beside any others.

    As a context manager it stops at the end of the block, unless it was finished there. One that nobody holds any more
    is stopped when the next begins.

    While the engine computes, `tokens.read` may be given the lists of token ids that will come back in its outputs, the
    same objects: `finish` then takes some milliseconds less for 100,000 tokens.

    Args:
        llm: A `vllm.LLM`, started without any special argument; or what `Connection.at` returns, in a process that has
            no engine object.
        spec: What to capture; or a list with a Spec for each sample, whose layers workers write for all of them.
        transport: "segment" (shared memory), "tcp" or "nixl" (a network, see docs/hosts.md), "inline"
            (bytes through calls: slow, works everywhere), or "auto".
        budget_bytes: Most memory for rows over all workers; by default a quarter of RAM, at most 8 GiB.
        staging: On GPU engines, "staged" (rows pass through a few hundred MiB of device memory), "direct" (kernels
            write to pinned host memory: no device memory, slower for many rows), or "auto".
        on_full: "fail": rows beyond the budget end the capture with `BudgetError`, and its requests go on; "spill" or a
            `Spill`: they go to files, and the engine waits while these are written. Not with "inline", "tcp", "nixl".
        expected_rows: A guess that lets the workers prepare memory ahead.
        wait: Return when all workers have begun; otherwise `started` waits, after requests have been added.

    Raises:
        SpecError: An argument or a layer that cannot be; or requests wait in the engine, the first Recording of which
            has to send a prompt of its own.
        EngineUnsupportedError: The plugin is not loaded, or the model cannot be tapped.
        CaptureError: A GPU engine runs as many captures as it has room for.
    """

    def __init__(
        self,
        llm: Any,
        spec: Spec | Sequence[Spec],
        *,
        transport: str = "auto",
        budget_bytes: int | None = None,
        staging: str = "auto",
        on_full: str | Spill = "fail",
        expected_rows: int = 0,
        wait: bool = True,
    ) -> None:
        self.wishes = wishes = Wishes(spec)
        if staging not in STAGINGS:
            raise SpecError(f"staging={staging!r} is not known.{nearest(staging, STAGINGS)}")
        on_full = read_on_full(on_full, AT_THE_END)
        budget = read_budget(budget_bytes)
        self.spec = wishes.of(0)
        engine = None if isinstance(llm, Connection) else llm
        self.tokens = TokenArrays()
        self._finishing: Callable[[], HandedOver] | None = None
        self._has_ended = self._leaves_rows = False
        self._llm: Callable[[], Any] = weakref.ref(engine) if engine is not None else lambda: None
        self._marked_samples: set[int] = set()
        self._connection = connection = connect(llm)
        connection.stop_lost()
        self._way = way = connection.choose_transport(transport)
        if isinstance(on_full, Spill) and not connection.ways.shares_memory(way):
            raise SpecError(
                f"on_full={on_full!r} needs shared memory: on this way all rows are copied to this process. Run on "
                "the engine's host and leave transport out, or capture fewer prompts at a time."
            )
        self._layers = {_kind(wish): resolve(connection, wish) for wish in wishes}
        self._start = messages.Start(
            capture_id=new_capture_id(),
            streams=union(self._layers.values()),
            positions=plain_positions(self.spec.shipped_positions),
            residual=connection.residual,
            shared=bool(way),
            clients={rank: reader.client for rank, reader in connection.ways.readers(way).items()} if way else {},
            budget_bytes=budget // len(connection.hellos),
            staging=staging,
            expected_rows=expected_rows if list(wishes.shipped) == ["all"] else 0,
            routing_versions=connection.routing_versions,
            spill=on_full.terms(len(connection.hellos)) if isinstance(on_full, Spill) else None,
        )
        self._starting: Callable[[], object] | None = None
        connection.expect_end(self, self._start, way)
        try:
            self._starting = connection.ask(messages.Started, self._start, way)
            if wait or connection.ways.goes_over_network(way):
                self.started()
        except BaseException:
            self.stop()  # where it has begun: a rank may have failed alone, or the call been interrupted
            raise

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._has_ended:
            self.stop()

    def started(self) -> None:
        """Wait until all workers have begun, in the thread that made this object.

        Raises:
            TapError: One could not: `stop`.
        """
        if self._starting is not None:
            self._starting()
            self._starting = None

    def mark(self, params: Any, sample: int) -> Any:
        """Return a copy of a request's parameters that makes the engine capture it as this sample.

        Positions that the prefix cache holds never go through the model, so a captured request reads it up to the first
        position that is asked for; not at all for "all" and "prompt".

        Args:
            params: The request's `vllm.SamplingParams`, or `PoolingParams` where the engine pools.
            sample: The place of its output in the list that `finish` takes. Each request has a mark of its own.

        Raises:
            SpecError: An argument that cannot be, or this recording has ended.
            PositionError: The request will have none of the generated rows that are asked for.
        """
        sample = self._checked(params, sample)
        return self._marked(copy.deepcopy(params), sample)

    def mark_all(self, params: Sequence[Any], *, owned: bool = False) -> list[Any]:
        """Return what `mark` returns for samples 0, 1, ... with these parameters.

        Args:
            params: One for each sample.
            owned: Nobody else holds what these consist of: the engine may write into it.

        Raises:
            SpecError: As for `mark`.
            PositionError: As for `mark`.

        Cost: unless they are owned, one deep copy for each object among them, however often it occurs (0.1 ms).
        """
        marks.require_list(params)
        for sample, given in enumerate(params):
            self._checked(given, sample)
        copies = {id(given): given for given in params}
        if not owned:
            copies = {key: copy.deepcopy(given) for key, given in copies.items()}
        return [self._marked(copies[id(given)], sample) for sample, given in enumerate(params)]

    def note_marked(self, samples: Iterable[int]) -> None:
        """Take note of samples whose requests another process sends, marked by `labels.mark` with this `capture_id`."""
        self._marked_samples.update(samples)

    def forget_marked(self, sample: int) -> None:
        """Forget a sample of which `finish` will get no output, in a capture that goes on and on."""
        self._marked_samples.discard(sample)

    def _checked(self, params: Any, sample: int) -> int:
        """Return the number of a sample that may be marked with these parameters."""
        if self._has_ended:
            raise SpecError("this Recording has ended: mark the parameters with the one that is under way.")
        if (llm := self._llm()) is not None:
            frontend.require_params(llm, params)
        number = marks.sample_number(sample)
        missing.check_params(self.wishes.of(number), params, number)
        return number

    def _marked(self, copied: Any, sample: int) -> Any:
        self._marked_samples.add(sample)
        marked = copy.copy(copied)
        field = "extra_args" if hasattr(marked, "extra_args") else "extra_kwargs"
        spec = self.wishes.of(sample)
        begin, reads_cache = begin_of(spec.positions), None
        if not begin.is_last_or_later:
            reads_cache = marks.cache_bound(marked, begin)
            marked.skip_reading_prefix_cache = True
        own = plain_positions(spec.shipped_positions) if len(self.wishes.shipped) > 1 else None
        label = mark(self._start.capture_id, sample, getattr(marked, "n", 1) or 1, own, reads_cache)
        setattr(marked, field, {**(getattr(marked, field) or {}), **label})
        if hasattr(marked, "skip_clone"):
            # vLLM copies the parameters of each request deeply, to keep what it writes into them from the caller's.
            marked.skip_clone = True
        return marked

    def counts(self) -> tuple[int, int]:
        """Return rows and bytes taken so far, or in all after the end; costs the engine about a millisecond."""
        return self.progress()[:2]

    def progress(self) -> Progress:
        """Return what `counts` does, and for how long the engine has waited for files of rows beyond the budget."""
        states = self._connection.status(self._start.capture_id)
        return Progress(
            max(state["num_rows"] for state in states),
            sum(state["num_bytes"] for state in states),
            max(state["stalled_seconds"] for state in states),
        )

    @property
    def capture_id(self) -> str:
        """Name of the capture in the engine."""
        return self._start.capture_id

    @property
    def has_ended(self) -> bool:
        """True if it was finished or stopped."""
        return self._has_ended

    @property
    def row_bytes(self) -> int:
        """Bytes of one position over all streams and layers of this capture, with its labels."""
        infos = [info for hello in self._connection.hellos for info in hello.streams]
        layers = {
            (info.name, layer): info.width * ITEMSIZE[info.dtype]
            for info in infos
            for layer in info.layers
            if layer in self._start.streams.get(info.name, ())
        }
        return sum(layers.values()) + NUM_LABELS * LABEL_BYTES * len(self._connection.hellos)

    def take(self) -> HandedOver:
        """Take hold of the rows that have come since the last time; the capture goes on.

        Raises:
            TapError: What ended the capture early.
        """
        self.started()
        call = messages.Take(capture_id=self.capture_id)
        return self._connection.hand_over(call, self._way)()

    def end(self) -> None:
        """Have the workers end the capture, without a wait: `finish` is to follow, and takes what they hand over.

        Optional. To be called when the engine has ended all requests, in the thread that calls `finish`.

        Raises:
            TapError: A worker could not begin, or what kept the call from being sent.
        """
        self.started()
        if self._finishing is None:
            call = messages.Finish(capture_id=self.capture_id, labels=self._leaves_rows)
            self._finishing = self._connection.hand_over(call, self._way)

    def leave_rows(self) -> None:
        """Have the rows stay in the workers: what `finish` returns has their labels, and can have them written there.

        Sockets must reach all workers.
        """
        self._leaves_rows = True

    def finish(self, outputs: Sequence[Any]) -> Capture:
        """End the capture and return its rows, checked against what the engine returned.

        Args:
            outputs: vLLM's finished outputs by sample number; None for a sample that has none, such as an aborted
                request, whose rows are dropped.

        Raises:
            SpecError: Something that is no output.
            BudgetError: The rows did not fit the budget.
            RowsMissingError: A row did not arrive, or came for other tokens than the final ones, or from another
                request than the one that its output names; as where a request had no mark, or that of another.
            PositionError: A prompt or a completion lacks a position that was asked for.
            EngineDiedError: The engine ended.
        """
        begin = time.perf_counter()
        try:
            outputs = marks.checked_outputs(outputs, self._marked_samples)
            self.end()
            parts = [(spec, self._sequences(spec, outputs)) for spec in self._first_of_kind()]  # while workers finish
        except BaseException:
            self.stop()
            raise
        handed_over = self._finished()
        handed = time.perf_counter()
        results = [self._part(spec, outputs, sequences, handed_over) for spec, sequences in parts]
        result = results[0] if len(results) == 1 else MixedCapture(results, outputs)
        result.seconds.update(
            finish=handed - begin,
            wait=max(descriptor.wait_seconds for descriptor, _ in handed_over),
            check=time.perf_counter() - handed,
        )
        for part in results:
            for spec in self.wishes:
                missing.check_result(spec, part.sequences, result, self.wishes.has(spec))
        return result

    def _first_of_kind(self) -> list[Spec]:
        """Return a Spec for each choice of streams and layers."""
        return list({_kind(spec): spec for spec in reversed(self.wishes.distinct)}.values())[::-1]

    def _sequences(self, kind: Spec, outputs: list[Any]) -> Sequences:
        """Return the sequences of the samples with the streams and layers of a Spec."""
        if self.wishes.is_one:
            return Sequences(outputs, kind.positions, self.tokens)
        mine = [output if _kind(self.wishes.of(n)) == _kind(kind) else None for n, output in enumerate(outputs)]
        return Sequences(mine, lambda sample: self.wishes.of(sample).positions, self.tokens)

    def _finished(self) -> HandedOver:
        """Wait for what the workers hand over. Interrupted, it is to be called again."""
        assert self._finishing is not None
        try:
            handed_over = self._finishing()
        except Exception:
            self._finishing = None
            raise
        self._finishing = None
        self._ended()
        return handed_over

    def _ended(self) -> None:
        self._has_ended = True
        self._connection.ended(self._start.capture_id)

    def _part(self, spec: Spec, outputs: list[Any], sequences: Sequences, handed_over: HandedOver) -> Capture:
        """Return the samples that have the streams and layers of a Spec."""
        matcher = RowMatcher(sequences)
        ranks = [RankRows(descriptor, memory, matcher) for descriptor, memory in handed_over if descriptor.streams]
        mine = [output if sample in sequences.request_ids else None for sample, output in enumerate(outputs)]
        result = self.new_result(mine, sequences, ranks, spec)
        if not self.wishes.is_one:
            result.specs = [self.wishes.of(sample) for sample in range(len(outputs))]
        return result

    def places_of(self, spec: Spec) -> set[Place]:
        """Return the streams and layers of one of the Specs of this capture."""
        return {(stream, layer) for stream, layers in self._layers[_kind(spec)].items() for layer in layers}

    def new_result(self, outputs: list[Any], sequences: Sequences, ranks: Sequence[RowSource], spec: Spec) -> Capture:
        """Return rows as a result of this capture, in the streams and layers of one of its Specs."""
        layers = self._layers[_kind(spec)]
        if len(self._layers) > 1:
            ranks = [SomeRows(rank, self.places_of(spec)) for rank in ranks]
        ranks = [made_of(rank, spec, sequences) for rank in ranks]
        if spec.reduce is not None:
            sequences = with_one_row_each(sequences)
        conventions = {info.name: info.convention for hello in self._connection.hellos for info in hello.streams}
        if self._connection.residual:
            conventions["hidden_states"] = self._connection.residual
        routing = dict(sorted(self._connection.routing.items()))
        for name in ROUTER_STREAMS:
            if name in conventions and routing:
                conventions[name] += f"; routing: {summary(routing)}"
        made = streams_made(spec, layers)
        result = Capture(
            spec,
            outputs,
            sequences,
            ranks,
            {name: conventions[stream] + NOTES.get(name, "") for name, stream in made.items() if layers[stream]},
            routing,
            list(made),
            self._connection.num_layers,
            bool(self._connection.available("final_hidden_states")),
        )
        result.model = self._connection.model
        return result

    def stop(self) -> None:
        """Abandon the capture in the workers. While an exception is handled, failing to do so becomes a note on it."""
        current = sys.exception()
        try:
            if self._finishing is not None:
                self._finished()  # and let go of it
                return
            if isinstance(current, EngineDiedError):
                return  # a silent worker would be waited for again; where it lives after all, `stop_lost` ends it
            stop = messages.Stop(capture_id=self._start.capture_id)
            self._connection.ask(messages.Stopped, stop, self._way)()
            self._ended()
        except TapError as error:
            if current is None:
                raise
            current.add_note(f"(and the capture could not be stopped: {error})")


def _kind(spec: Spec) -> tuple[Any, ...]:
    """Return what Specs have in common whose samples have the same streams and layers, and the same made of them."""
    return tuple(getattr(spec, field) for field in (*LAYERED_FIELDS, *SINGLE_FIELDS, "reduce", "dtype"))
