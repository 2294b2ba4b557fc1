"""Stage of Ray Data's vLLM processor that records: each of its batches becomes a part of a dataset.

Runs in Ray's actors, which import it, and Ray with it. `ray_data` puts it into a processor.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ray.llm._internal.batch.stages.vllm_engine_stage import vLLMEngineStageUDF

from vllm_tap.client import missing
from vllm_tap.client.async_connection import connect_engines
from vllm_tap.client.engines import Engines
from vllm_tap.client.identity import full_model_facts, versions
from vllm_tap.client.recording import Recording
from vllm_tap.client.result import Capture
from vllm_tap.errors import SpecError
from vllm_tap.spec import Spec
from vllm_tap.store.facts import Facts, facts_of, require_same
from vllm_tap.store.places import place_of
from vllm_tap.store.writer import write_part
from vllm_tap.vllm import asynchronous
from vllm_tap.vllm.refused import told

MOST_CAPTURES: Final = 8
"""Batches that are captured at a time: a GPU engine serves so many captures."""


@dataclass(frozen=True)
class Options:
    """Recording that all actors share.

    Attributes:
        spec: What to capture.
        path: Folder of the dataset, absolute, or a URL.
        numbers: Handle of the actor that numbers samples.
        column: Name of the column for the number.
        metadata: Columns that are kept with a sample.
        facts: Of what is in the folder already.
        recording: Arguments of `Recording`.
    """

    spec: Spec
    path: str
    numbers: Any
    column: str
    metadata: tuple[str, ...]
    facts: Facts | None
    recording: Mapping[str, Any]


class RecordingStage(vLLMEngineStageUDF):  # type: ignore[misc]
    """Ray's stage, whose requests are captured."""

    def __init__(self, *args: Any, recording: Options, **options: Any) -> None:
        super().__init__(*args, **options)
        self._options, self._recorder = recording, Recorder(self.llm.engine, recording)

    async def udf(self, batch: list[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
        """Yield the replies to a batch when its part is sealed, each with the number of its sample.

        Raises:
            TapError: The batch was not captured, or not written.
        """
        kept = {row[self.IDX_IN_BATCH_COLUMN]: _plain(row, self._options.metadata) for row in batch}
        replies, run = [], super().udf
        async with self._recorder.batch() as piece:
            async for reply in run(batch):
                replies.append(reply)
                piece.describe(str(reply["request_id"]), kept[reply[self.IDX_IN_BATCH_COLUMN]])
            numbers = await self._recorder.seal(piece)
        for reply in replies:
            yield {**reply, self._options.column: numbers.get(str(reply["request_id"]))}


def _plain(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return columns of a row as JSON can hold them.

    Raises:
        SpecError: It lacks one.
    """
    absent = [name for name in names if name not in row]
    if absent:
        raise SpecError(f"metadata={list(names)}: rows have no column {absent[0]!r}, but {sorted(row)}.")
    return {name: value.tolist() if hasattr(value := row[name], "tolist") else value for name in names}


class Piece:
    """Requests of a batch, under a capture of their own.

    Attributes:
        recording: The capture.
        engine: Number of the engine that has it.
        metadata: Metadata of each sample.
    """

    def __init__(self, llm: Any, recording: Recording, engine: int) -> None:
        self.recording, self.engine, self._llm = recording, engine, llm
        self._samples: dict[str, int] = {}
        self._outputs: list[Any] = []
        self.metadata: list[dict[str, Any] | None] = []

    def mark(self, prompt: Any, params: Any, request_id: str) -> Any:
        """Return the parameters of a request that make the engine capture it."""
        sample, spec = len(self._outputs), self.recording.spec
        with told(sample):
            missing.check_prompts(spec, [prompt])
            params = asynchronous.new_params(self._llm, params, {}, "FINAL_ONLY")
            marked = self.recording.mark(params, sample)
        self._samples[request_id] = sample
        self._outputs.append(None)
        self.metadata.append(None)
        return marked

    def take(self, request_id: str, output: Any) -> None:
        """Keep the output of a request."""
        self._outputs[self._samples[request_id]] = output

    def describe(self, request_id: str, metadata: dict[str, Any]) -> None:
        """Keep the metadata of a request; nothing of one that failed."""
        if request_id in self._samples and metadata:
            self.metadata[self._samples[request_id]] = metadata

    def finish(self) -> Capture | None:
        """Return the rows; None where every request failed."""
        if not any(output is not None for output in self._outputs):
            return None
        return self.recording.finish(self._outputs)

    def numbers(self, first: int) -> dict[str, int]:
        """Return the number of each request that ended, given that of the first sample."""
        return {name: first + n for name, n in self._samples.items() if self._outputs[n] is not None}


current: contextvars.ContextVar[Piece | None] = contextvars.ContextVar("vllm_tap_piece", default=None)
"""The batch that this task works on: Ray starts a task for each of its rows, which inherit it."""


class Recorder:
    """Takes the place of `generate` of an `AsyncLLM`, and writes what it captures."""

    def __init__(self, llm: Any, options: Options) -> None:
        asynchronous.require_async(llm)
        self._llm, self._options = llm, options
        self._captures = asyncio.Semaphore(MOST_CAPTURES)
        self._connecting = asyncio.Lock()
        self._engines: Engines | None = None
        self._generate = llm.generate
        llm.generate = self.generate

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield the outputs of a request, which is captured if it belongs to a batch."""
        piece = current.get()
        if piece is not None:
            sampling_params = piece.mark(prompt, sampling_params, request_id)
            options.update(asynchronous.route(self._llm, piece.engine))
        outputs = self._generate(prompt, sampling_params, request_id, **options)
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                if piece is not None and output.finished:
                    piece.take(request_id, output)
                yield output

    @contextlib.asynccontextmanager
    async def batch(self) -> AsyncIterator[Piece]:
        """Capture what tasks that start in the block send."""
        async with self._captures:
            lives = (await self._connected()).least_busy()
            with lives.counted(1), lives.blamed():
                spec, options = self._options.spec, self._options.recording
                recording = await asyncio.to_thread(Recording, lives.connection, spec, **options)
                try:
                    piece = Piece(self._llm, recording, lives.engine)
                    current.set(piece)
                    yield piece
                finally:
                    current.set(None)
                    if not recording.has_ended:
                        await asyncio.to_thread(recording.stop)

    async def seal(self, piece: Piece) -> dict[str, int]:
        """Write the rows of a batch as a part; return the samples' numbers by the names of the requests.

        Raises:
            TapError: Rows are missing, or cannot be written.
        """
        capture = await asyncio.to_thread(piece.finish)
        if capture is None:
            return {}
        first = await self._options.numbers.take.remote(len(capture.outputs))
        await asyncio.to_thread(self._write, capture, first, piece.metadata)
        return piece.numbers(first)

    def _write(self, capture: Capture, first: int, metadata: list[dict[str, Any] | None]) -> None:
        facts = facts_of(capture, self._model, "", versions())
        if self._options.facts is not None:
            require_same(facts, self._options.facts, self._options.path)
        given = metadata if self._options.metadata else None
        write_part(place_of(self._options.path), capture, facts, first_sample=first, metadata=given)

    @functools.cached_property
    def _model(self) -> dict[str, str]:
        return full_model_facts(self._llm)

    async def _connected(self) -> Engines:
        """Connect on first use."""
        async with self._connecting:
            if self._engines is None:
                self._engines = Engines(self._llm, (await connect_engines(self._llm)).connections)
        return self._engines
