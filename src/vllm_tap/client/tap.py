"""`Tap`: captures from an offline engine, all at the end or as they come. Client process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, TypeVar

from vllm_tap.client import missing
from vllm_tap.client.bounds import AS_THEY_COME, Spill, at_the_end, read_budget, read_on_full, room_of
from vllm_tap.client.capture import capture, take_chat_options
from vllm_tap.client.collector import Collector
from vllm_tap.client.prompts import chat_of, each_prompt
from vllm_tap.client.recording import Recording
from vllm_tap.client.result import Capture, Sample
from vllm_tap.client.room import PART_OF_BUDGET
from vllm_tap.client.wishes import Wishes
from vllm_tap.errors import SpecError, counted_from
from vllm_tap.spec import Spec
from vllm_tap.vllm import frontend, stepping
from vllm_tap.vllm.refused import told

BATCH: Final = 64
"""Prompts of one call to an engine that pools."""

T = TypeVar("T", bound=Sample)


class RowBlock(Sample):
    """Rows of one sequence that is being generated: consecutive positions, with the attributes of a sample.

    Each row comes once, when the token behind it is known; then it is the sequence's own, whatever was drafted.

    Attributes:
        finished: Whether it is the last block of its sequence.
    """

    finished = False

    def __reduce__(self) -> Any:
        alone = self._alone()
        return RowBlock, (alone._capture, alone._number), {"finished": self.finished}


class Tap:
    """Captures from an engine.

    Args:
        llm: A `vllm.LLM`, started without any special argument.
    """

    def __init__(self, llm: Any) -> None:
        frontend.require_llm(llm)
        self._llm = llm

    def capture(self, prompts: Any, spec: Spec | Sequence[Spec], **arguments: Any) -> Capture:
        """Generate from prompts and return all rows at the end; see `vllm_tap.capture`."""
        return capture(self._llm, prompts, spec, **arguments)

    def stream(
        self,
        prompts: Iterable[Any],
        spec: Spec | Sequence[Spec],
        *,
        on_full: str | Spill = "wait",
        budget_bytes: int | None = None,
        transport: str = "auto",
        staging: str = "auto",
        lora_request: Any = None,
        sampling_params: Any = None,
        **sampling: Any,
    ) -> Stream[Sample]:
        """Generate from prompts and yield samples as they end, while others run.

        Args:
            prompts: As `capture` takes them, of any number: they are read as there is room.
            spec: What to capture; or a list with a Spec for each prompt, as for `capture`.
            on_full: "wait": prompts wait until rows of those before them have been read, so that the budget holds;
                "spill" or a `Spill`: rows beyond the budget go to files, and prompts wait where these would be full;
                "fail": all prompts are added at once, and rows beyond the budget end the stream with `BudgetError`.
            budget_bytes: Most memory for rows that have not been read, over all workers; by default a quarter of RAM,
                at most 8 GiB. With "wait", one prompt that is larger alone ends the stream.
            transport: As for `capture`.
            staging: As for `capture`.
            lora_request: A `vllm.lora.request.LoRARequest` for all prompts.
            sampling_params: A `vllm.SamplingParams` for all prompts.
            **sampling: As for `capture`.

        Returns:
            Stream: an iterator of `Sample`s in the order in which they end; `sample.index` is the prompt's number,
            `sample.output` what vLLM returned for it. Samples own their rows. As a context manager, or by `close`, the
            stream aborts what runs and gives the memory back.

        Raises:
            TapError: As for `capture`, from here or while the stream is read.

        Cost:
            As for `capture`, and one copy of each row into memory of the sample's own.
        """
        on_full = read_on_full(on_full, AS_THEY_COME)
        plan = self._plan(sampling_params, sampling, lora_request)
        if frontend.pools(self._llm):
            return Stream(self._in_batches(prompts, spec, plan, transport, staging, budget_bytes, at_the_end(on_full)))
        return Stream(self._run(prompts, spec, plan, on_full, transport, staging, budget_bytes).samples())

    def stream_rows(
        self,
        prompts: Iterable[Any],
        spec: Spec | Sequence[Spec],
        *,
        on_full: str | Spill = "wait",
        budget_bytes: int | None = None,
        transport: str = "auto",
        staging: str = "auto",
        lora_request: Any = None,
        sampling_params: Any = None,
        **sampling: Any,
    ) -> Stream[RowBlock]:
        """Generate from prompts and yield rows while their sequences are generated.

        Args:
            prompts: As for `stream`.
            spec: As for `stream`.
            on_full: As for `stream`.
            budget_bytes: As for `stream`.
            transport: As for `capture`.
            staging: As for `capture`.
            lora_request: As for `stream`.
            sampling_params: As for `stream`; of one completion.
            **sampling: As for `capture`.

        Returns:
            Stream: an iterator of `RowBlock`s, those of one sequence in order of position. Positions that nobody asked
            for make no block. The last one of a sequence has `finished`. Where positions count from the end of what is
            generated, it is the only one.

        Raises:
            SpecError: The engine pools, `n` is above 1, or a `Spec` has `reduce`.
            TapError: As for `stream`.

        Cost:
            As for `stream`, and a call to each worker for every step.
        """
        on_full = read_on_full(on_full, AS_THEY_COME)
        plan = self._plan(sampling_params, sampling, lora_request)
        if frontend.pools(self._llm) or (plan.params.n or 1) > 1:
            raise SpecError("rows come while one sequence is generated for each prompt: use stream, or capture.")
        for wish in Wishes(spec):
            if wish.reduce is not None:
                raise SpecError(
                    f"stream_rows yields rows as they come, not their {wish.reduce}: use stream, or capture."
                )
        return Stream(self._run(prompts, spec, plan, on_full, transport, staging, budget_bytes).blocks())

    def _run(
        self,
        prompts: Iterable[Any],
        spec: Spec | Sequence[Spec],
        plan: Plan,
        on_full: str | Spill,
        transport: str,
        staging: str,
        budget_bytes: int | None,
    ) -> _Run:
        """Begin a capture of prompts that are added as there is room."""
        recording = Recording(
            self._llm,
            spec,
            transport=transport,
            budget_bytes=budget_bytes,
            staging=staging,
            on_full=at_the_end(on_full),
        )
        room = None if on_full == "fail" else room_of(read_budget(budget_bytes), on_full)
        return _Run(self._llm, prompts, recording, plan, room)

    def _plan(self, given: Any, fields: dict[str, Any], lora_request: Any) -> Plan:
        frontend.require_no_others(self._llm, "capture beside them with vllm_tap.Recording")
        chat = take_chat_options(fields)
        if given is not None and fields:
            raise SpecError(f"pass sampling_params or its fields ({', '.join(fields)}), not both.")
        if given is None:
            given = frontend.new_params(self._llm, fields, frontend.default_fields(self._llm))
        frontend.require_params(self._llm, given)
        return Plan(given, chat, lora_request)

    def _in_batches(
        self,
        prompts: Iterable[Any],
        spec: Spec | Sequence[Spec],
        plan: Plan,
        transport: str,
        staging: str,
        budget_bytes: int | None,
        on_full: str | Spill,
    ) -> Iterator[Sample]:
        """Yield samples of an engine that pools: captures of some prompts, one after another."""
        number, wishes = 0, Wishes(spec)
        for batch in _batches(each_prompt(prompts)):
            with counted_from(number):
                result = capture(
                    self._llm,
                    batch,
                    wishes.part(number, number + len(batch)),
                    transport=transport,
                    staging=staging,
                    budget_bytes=budget_bytes,
                    on_full=on_full,
                    progress=False,
                    lora_request=plan.lora_request,
                    sampling_params=plan.params,
                )
            result.number_from(number)
            number += len(result)
            yield from result
        wishes.require(number)


class Plan(NamedTuple):
    """Terms on which prompts are run: sampling parameters, what `LLM.chat` takes beside them, and an adapter."""

    params: Any
    chat: dict[str, Any]
    lora_request: Any


class Stream(Generic[T]):
    """Samples or blocks as they come. Closed at the end of a `with` block, or when it is not used any more."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return next(self._items)

    def __enter__(self) -> Stream[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Abort what runs and give the memory back."""
        self._items.close()  # type: ignore[attr-defined]


class _Running(NamedTuple):
    """A prompt whose request runs."""

    sample: int
    added: stepping.Added
    num_bytes: int


class _Run:
    """Prompts that go through an engine as there is room, and what comes of them."""

    def __init__(self, llm: Any, prompts: Iterable[Any], recording: Recording, plan: Plan, budget: int | None) -> None:
        self._llm, self._recording, self._plan = llm, recording, plan
        self._prompts = enumerate(each_prompt(prompts))
        self._budget = None if budget is None else budget // PART_OF_BUDGET
        self._collector = Collector(recording)
        self._running: dict[str, _Running] = {}
        self._sent: dict[int, int] = {}  # by sample: rows of earlier positions have been yielded
        self._num_prompts = 0
        self._has_more = True

    def samples(self) -> Iterator[Sample]:
        """Yield samples as they end."""
        try:
            while self._admit():
                ended = stepping.step(self._llm)
                if ended:
                    self._collector.take()
                for output in ended:
                    sample = self._running.pop(output.request_id).sample
                    result = self._collector.result(sample, output)
                    missing.check_sample(result.spec, sample, output, result)
                    yield from (result.sample(0, completion) for _, completion in result.sequences.slots)
            self._end()
        finally:
            self._close()

    def blocks(self) -> Iterator[RowBlock]:
        """Yield rows of every step."""
        try:
            while self._admit():
                ended = {output.request_id: output for output in stepping.step(self._llm)}
                self._collector.take()
                for request_id, running in list(self._running.items()):
                    output = ended.get(request_id) or stepping.tokens_so_far(self._llm, running.added.inside[0])
                    yield from self._new_rows(running, output, request_id in ended)
                    if request_id in ended:
                        del self._running[request_id]
                        self._collector.drop(running.sample)
            self._end()
        finally:
            self._close()

    def _new_rows(self, running: _Running, output: Any, is_last: bool) -> Iterator[RowBlock]:
        if output is None:
            return
        generated = len(output.outputs[0].token_ids)
        begin, end = self._sent.get(running.sample, 0), len(output.prompt_token_ids) + generated - 1
        if not generated or (self._recording.wishes.of(running.sample).needs_end and not is_last):
            return
        if end > begin or is_last:
            result = self._collector.rows_until(running.sample, output, begin, end)
            self._sent[running.sample] = end
            block = RowBlock(result, 0)
            block.finished = is_last
            if len(block) or is_last:
                yield block
            if is_last:
                missing.check_sample(result.spec, running.sample, output, result)

    def _admit(self) -> bool:
        """Add prompts for which there is room; return whether any runs."""
        while self._has_more and self._has_room():
            number, prompt = next(self._prompts, (0, None))
            if prompt is None:
                self._has_more = False
                self._recording.wishes.require(self._num_prompts)
                break
            self._num_prompts = number + 1
            with counted_from(number):
                missing.check_prompts(self._recording.wishes.of(number), [prompt])
            params = self._recording.mark(self._plan.params, number)
            chat = chat_of(prompt, self._plan.chat, number)
            with told(number):
                added = stepping.add(self._llm, prompt, params, self._plan.lora_request, chat)
            most_rows = len(added.inside) * (added.prompt_len + (params.max_tokens or self._longest()))
            self._running[added.request_id] = _Running(number, added, most_rows * self._recording.row_bytes)
        return bool(self._running)

    def _longest(self) -> int:
        return int(self._llm.model_config.max_model_len)

    def _has_room(self) -> bool:
        if self._budget is None or not self._running:
            return True
        expected = sum(running.num_bytes for running in self._running.values())
        # What was handed over counts as well: its memory is free again when the last row in it has been read.
        return expected + self._collector.held_bytes < self._budget

    def _end(self) -> None:
        self._recording.stop()

    def _close(self) -> None:
        """Abort what still runs, where the stream was not read to its end."""
        stepping.abort(self._llm, [name for running in self._running.values() for name in running.added.inside])
        self._running.clear()
        self._collector.close()
        if not self._recording.has_ended:
            self._recording.stop()


def _batches(prompts: Iterator[Any]) -> Iterator[list[Any]]:
    batch: deque[Any] = deque()
    for prompt in prompts:
        batch.append(prompt)
        if len(batch) == BATCH:
            yield list(batch)
            batch.clear()
    if batch:
        yield list(batch)
