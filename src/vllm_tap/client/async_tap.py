"""`AsyncTap`: captures from vLLM's `AsyncLLM`, beside requests that nobody captures. Client process."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from typing import Any, Final, TypeVar

from vllm_tap.client import missing
from vllm_tap.client.async_connection import connect_engines
from vllm_tap.client.async_record import record_async
from vllm_tap.client.bounds import AS_THEY_COME, Spill, at_the_end, read_budget, read_on_full
from vllm_tap.client.capture import take_chat_options
from vllm_tap.client.engines import Engines
from vllm_tap.client.live import Request
from vllm_tap.client.prompts import chat_of, each_prompt, read_prompts, unpacked
from vllm_tap.client.record import run_of
from vllm_tap.client.result import Capture, Sample
from vllm_tap.client.shares import begun
from vllm_tap.client.tap import RowBlock
from vllm_tap.client.tasks import finished
from vllm_tap.errors import SpecError, counted_from
from vllm_tap.spec import Spec
from vllm_tap.store.dataset import Dataset
from vllm_tap.store.manifest import Manifest
from vllm_tap.vllm import asynchronous, conversations
from vllm_tap.vllm.refused import told
from vllm_tap.vllm.token_types import with_types

MOST_WAITING: Final = 64
"""Samples or blocks that wait for their reader, beyond which requests wait to hand over more."""

T = TypeVar("T", bound=Sample)


class AsyncTap:
    """Captures from an `AsyncLLM`, any number at a time, in the event loop that runs it.

    Requests of one Spec share a capture in the engine. Of data parallel engines, each prompt goes to the one with the
    fewest captured requests.

    Args:
        async_llm: A `vllm.v1.engine.async_llm.AsyncLLM`, started without any special argument.
        budget_bytes: Most memory for rows of each Spec that have not been read, over all workers of an engine; by
            default a quarter of RAM, at most 8 GiB. What a `Spill` may take is of an engine, too.
        staging: As for `Recording`.
        on_full: Of streams, as for `Tap.stream`, and prompts of all that have the same Spec wait for one another;
            `capture` hands all rows over at the end, so there "wait" is as "fail".

    Raises:
        SpecError: It is something else, or it pools.
    """

    def __init__(
        self,
        async_llm: Any,
        *,
        budget_bytes: int | None = None,
        staging: str = "auto",
        on_full: str | Spill = "wait",
    ) -> None:
        asynchronous.require_async(async_llm)
        self._llm = async_llm
        self._options: dict[str, Any] = {
            "budget_bytes": read_budget(budget_bytes),
            "staging": staging,
            "on_full": read_on_full(on_full, AS_THEY_COME),
        }
        self._connecting = asyncio.Lock()
        self._engines: Engines | None = None

    async def capture(
        self, prompts: Any, spec: Spec, *, lora_request: Any = None, sampling_params: Any = None, **sampling: Any
    ) -> Capture:
        """Generate from prompts and return all rows at the end; see `vllm_tap.capture`.

        Cancelled, it aborts its requests and gives the memory back.

        Args:
            prompts: As `vllm_tap.capture` takes them.
            spec: What to capture.
            lora_request: A `vllm.lora.request.LoRARequest` for all prompts.
            sampling_params: A `vllm.SamplingParams` for all prompts.
            **sampling: Its fields, and of conversations what `LLM.chat` takes, as for `vllm_tap.capture`.

        Raises:
            TapError: As for `vllm_tap.capture`.

        Cost:
            As for `vllm_tap.capture`; of data parallel engines, `Capture.rows` over several samples is a copy.
        """
        given, chat = read_prompts(prompts).items, take_chat_options(sampling)
        params = asynchronous.new_params(self._llm, sampling_params, sampling, "FINAL_ONLY")
        items = [await self._taken(number, prompt, chat) for number, prompt in enumerate(given)]
        missing.check_prompts(spec, items)
        options = {**self._options, "on_full": at_the_end(self._options["on_full"])}
        try:
            async with begun(await self._connected(), len(items), spec, **options) as shares:

                async def final(number: int, prompt: Any) -> Any:
                    lives = shares.lives[number]
                    with lives.blamed():
                        return await self._final(
                            number, prompt, shares.mark(params, number), lora_request, lives.engine
                        )

                async with asyncio.TaskGroup() as group:
                    running = [group.create_task(final(number, prompt)) for number, prompt in enumerate(items)]
                return await finished(shares.finish([task.result() for task in running]))
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None

    async def record(
        self,
        prompts: Iterable[Any],
        spec: Spec,
        path: Any,
        *,
        resume: bool = False,
        batch: int = 256,
        metadata: Iterable[Mapping[str, Any] | None] | None = None,
        share: tuple[int, int] = (0, 1),
        on_part: Callable[[Manifest], None] | None = None,
        lora_request: Any = None,
        sampling_params: Any = None,
        **sampling: Any,
    ) -> Dataset:
        """Generate from prompts of any number and write their rows into a dataset; see `vllm_tap.record`.

        This process writes a part while the engines compute the next one. Cancelled, it aborts its requests and gives
        the memory back; what is sealed stays, and the same call with `resume=True` goes on behind it.

        Args:
            prompts: As `vllm_tap.record` takes them; read in another thread.
            spec: What to capture.
            path: As for `vllm_tap.record`.
            resume: The same.
            batch: Prompts that are captured together, over all engines. Their rows must fit `budget_bytes` of each, if
                possible twice.
            metadata: As for `vllm_tap.record`.
            share: The same.
            on_part: The same; called in another thread.
            lora_request: As for `capture`.
            sampling_params: As for `capture`.
            **sampling: As for `capture`.

        Returns:
            Dataset: what is sealed there now, also of earlier calls.

        Raises:
            DatasetError: As for `vllm_tap.record`.
            TapError: As for `capture`.
        """
        run = await asyncio.to_thread(run_of, self._llm, spec, sampling_params, lora_request, sampling)

        async def capture(piece: list[Any]) -> Capture:
            return await self.capture(
                piece, spec, lora_request=lora_request, sampling_params=sampling_params, **sampling
            )

        return await record_async(
            capture,
            unpacked(prompts),
            path,
            run,
            resume=resume,
            batch=batch,
            metadata=metadata,
            share=share,
            on_part=on_part,
        )

    async def _taken(self, number: int, prompt: Any, chat: dict[str, Any]) -> Any:
        """Return a prompt as `AsyncLLM` takes it, which knows no conversations."""
        options = chat_of(prompt, chat, number)
        if options is None:
            return prompt
        with told(number):
            return await conversations.prompt_of(self._llm, prompt, options)

    async def _final(self, number: int, prompt: Any, params: Any, lora_request: Any, engine: int) -> Any:
        """Return the output of a prompt."""
        last = None
        async for output in self._outputs(number, prompt, params, lora_request, engine):
            last = output
        return last

    async def _outputs(
        self, number: int, prompt: Any, params: Any, lora_request: Any, engine: int
    ) -> AsyncGenerator[Any, None]:
        name = f"tap-{secrets.token_hex(8)}"
        with told(number):
            (params,) = with_types(self._llm, [prompt], [params])
            outputs = asynchronous.generate(self._llm, prompt, params, name, engine, lora_request=lora_request)
            async with contextlib.aclosing(outputs):
                async for output in outputs:
                    yield output

    async def stream(
        self,
        prompts: Any,
        spec: Spec,
        *,
        most_running: int = 64,
        lora_request: Any = None,
        sampling_params: Any = None,
        **sampling: Any,
    ) -> AsyncGenerator[Sample, None]:
        """Generate from prompts and yield samples as they end, while others run.

        Close it (`contextlib.aclosing`), or cancel its task, to abort what runs and give the memory back.

        Args:
            prompts: As for `capture`, of any number: they are read as requests end.
            spec: What to capture.
            most_running: Prompts that run at a time.
            lora_request: As for `capture`.
            sampling_params: As for `capture`.
            **sampling: As for `capture`.

        Yields:
            Sample: as of `Tap.stream`; samples own their rows.

        Raises:
            TapError: As for `capture`.
        """
        chat = take_chat_options(sampling)
        params = asynchronous.new_params(self._llm, sampling_params, sampling, "FINAL_ONLY")

        async def samples(number: int, prompt: Any, request: Request, engine: int) -> AsyncGenerator[Sample, None]:
            output = await self._final(number, prompt, request.params, lora_request, engine)
            result = await request.result(output)
            result.first_sample = number
            missing.check_sample(spec, number, output, result)
            for sample, completion in result.sequences.slots:
                yield result.sample(sample, completion)

        async with contextlib.aclosing(self._merged(prompts, chat, spec, params, samples, most_running)) as items:
            async for item in items:
                yield item

    async def stream_rows(
        self,
        prompts: Any,
        spec: Spec,
        *,
        most_running: int = 64,
        lora_request: Any = None,
        sampling_params: Any = None,
        **sampling: Any,
    ) -> AsyncGenerator[RowBlock, None]:
        """Generate from prompts and yield rows while their sequences are generated.

        Args:
            prompts: As for `stream`.
            spec: What to capture.
            most_running: As for `stream`.
            lora_request: As for `stream`.
            sampling_params: As for `capture`; of one completion.
            **sampling: As for `capture`.

        Yields:
            RowBlock: as of `Tap.stream_rows`; its `output` has the tokens that were known.

        Raises:
            SpecError: `n` is above 1.
            TapError: As for `capture`.

        Cost:
            A call to each worker for every step, which requests of the same Spec share.
        """
        chat = take_chat_options(sampling)
        params = asynchronous.new_params(self._llm, sampling_params, sampling, "DELTA")
        if (params.n or 1) > 1:
            raise SpecError("rows come while one sequence is generated for each prompt: use stream, or capture.")

        async def blocks(number: int, prompt: Any, request: Request, engine: int) -> AsyncGenerator[RowBlock, None]:
            tokens = asynchronous.Tokens(is_delta=True)
            running = self._outputs(number, prompt, request.params, lora_request, engine)
            async with contextlib.aclosing(running) as outputs:
                async for output in outputs:
                    tokens.add(output)
                    result = await request.rows(tokens)
                    if result is not None:
                        result.first_sample = number
                        block = RowBlock(result, 0)
                        block.finished = tokens.finished
                        yield block
                        if tokens.finished:
                            missing.check_sample(spec, number, tokens, result)

        async with contextlib.aclosing(self._merged(prompts, chat, spec, params, blocks, most_running)) as items:
            async for item in items:
                yield item

    async def _merged(
        self,
        prompts: Any,
        chat: dict[str, Any],
        spec: Spec,
        params: Any,
        run: Callable[[int, Any, Request, int], AsyncGenerator[T, None]],
        most_running: int,
    ) -> AsyncGenerator[T, None]:
        """Yield what the prompts' generators yield, in the order in which it comes."""
        engines = await self._connected()
        numbered = enumerate(each_prompt(prompts))
        ready: asyncio.Queue[T | Request | BaseException | None] = asyncio.Queue(MOST_WAITING)

        async def work() -> None:
            try:
                for number, given in numbered:
                    prompt = await self._taken(number, given, chat)
                    with counted_from(number):
                        missing.check_prompts(spec, [prompt])
                    lives = engines.least_busy()
                    async with (
                        lives.request(spec, params) as request,
                        contextlib.aclosing(run(number, prompt, request, lives.engine)) as items,
                    ):
                        await request.begin(asynchronous.most_rows(self._llm, prompt, params))
                        try:
                            async for item in items:
                                await ready.put(item)
                            await ready.put(request)
                        except BaseException:
                            request.left()
                            raise
                await ready.put(None)
            except Exception as error:
                await ready.put(error)

        workers = [asyncio.create_task(work()) for _ in range(most_running)]
        try:
            for _ in workers:
                while (item := await ready.get()) is not None:
                    if isinstance(item, BaseException):
                        try:
                            raise item
                        finally:
                            del item  # which has this frame in its traceback
                    if isinstance(item, Request):  # all that came of it has been read
                        item.left()
                    else:
                        yield item
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            while not ready.empty():
                if isinstance(item := ready.get_nowait(), Request):
                    item.left()
            await engines.idle()

    async def _connected(self) -> Engines:
        """Connect on first use."""
        async with self._connecting:
            if self._engines is None:
                self._engines = Engines(self._llm, (await connect_engines(self._llm)).connections, **self._options)
        return self._engines
