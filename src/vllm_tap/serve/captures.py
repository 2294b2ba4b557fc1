"""Captures of requests that a server runs: around `AsyncLLM.generate`. In each API process, in its event loop."""

from __future__ import annotations

import contextlib
import contextvars
import json
from collections.abc import AsyncGenerator, Mapping
from http import HTTPStatus
from typing import Any, Final

import msgspec
import numpy as np
import torch
from fastapi import HTTPException  # vLLM answers to this one as to its own errors

from vllm_tap.client import missing
from vllm_tap.client.live import Lives
from vllm_tap.client.recording import resolve
from vllm_tap.client.reduced import streams_made
from vllm_tap.client.result import Capture
from vllm_tap.errors import BudgetError, PositionError, SpecError, TapError
from vllm_tap.frame import body
from vllm_tap.labels import KEY
from vllm_tap.serve.metrics import Metrics
from vllm_tap.serve.results import Result, Results
from vllm_tap.serve.settings import Settings
from vllm_tap.spec import Spec
from vllm_tap.store.dtypes import bytes_of
from vllm_tap.vllm import asynchronous

ROUTE: Final = "/v1/tap/rows"

ABORTED: Final = "the request was aborted."


class Call:
    """An HTTP request that may ask for rows: who sent it, and what it gets.

    Attributes:
        key: Digest of its API key.
        name: The X-Request-Id that the client chose.
        reply: Of its captured prompts.
    """

    def __init__(self, key: str, name: str) -> None:
        self.key, self.name = key, name
        self.reply: Reply | None = None


current: contextvars.ContextVar[Call | None] = contextvars.ContextVar("vllm_tap_call", default=None)
"""The HTTP request that this task handles."""


class Reply:
    """Rows of the prompts of an HTTP request, and the handle that its reply has.

    Attributes:
        handle: Put into `kv_transfer_params`; filled in until the last prompt has ended.
    """

    def __init__(self, results: Results, result: Result, streams: Mapping[str, Any]) -> None:
        self._results, self.result = results, result
        self._pending = 0
        self._error = ""
        self._choices: dict[tuple[int, int], dict[str, Any]] = {}
        self.handle: dict[str, Any] = {
            "id": result.id,
            "href": f"{ROUTE}/{result.id}",
            "streams": {name: list(layers) for name, layers in streams.items()},
            "dtype": {},
            "width": {},
            "choices": [],
        }
        self.num_prompts = 0
        self._has_begun = False

    def expect(self) -> int:
        """Return the number of one more prompt."""
        self._pending += 1
        self.num_prompts += 1
        return self.num_prompts - 1

    def add(self, prompt: int, captured: Capture, finished: bool) -> tuple[int, int]:
        """Take rows of a prompt; return how many, and their bytes.

        Raises:
            BudgetError: The server has no room for them.
        """
        if self._error:
            return 0, 0
        num_bytes = 0
        if not self._has_begun:
            self._has_begun = True
            self._results.add(self.result, _begin(self.result.id, captured))
        for number, (_, completion) in enumerate(captured.sequences.slots):
            frame, positions = self._rows(prompt, completion, captured, number, finished)
            self._choice(prompt, completion)["positions"] += positions
            self._results.add(self.result, frame)
            num_bytes += len(frame)
        return captured.num_rows, num_bytes

    def _choice(self, prompt: int, completion: int) -> dict[str, Any]:
        new = {"prompt": prompt, "completion": completion, "positions": []}
        return self._choices.setdefault((prompt, completion), new)

    def _rows(
        self, prompt: int, completion: int, captured: Capture, number: int, finished: bool
    ) -> tuple[bytes, list[int]]:
        start, stop = (int(bound) for bound in captured.sequences.wanted_starts[number : number + 2])
        flat = captured.sequences.wanted[start:stop]
        _, positions = captured.sequences.position_of(flat)
        pieces = [positions.astype("<i4").tobytes(), captured.sequences.token_ids[flat].astype("<i4").tobytes()]
        planes = []
        for stream, layers in captured.layers.items():
            for layer in layers:
                rows = captured.rows(stream, layer, start, stop)
                planes.append((stream, layer, _name(rows.dtype), int(rows.shape[1])))
                pieces.append(bytes_of(rows).tobytes())
            if layers:
                self.handle["dtype"][stream], self.handle["width"][stream] = planes[-1][2:]
        frame = body.encode(
            "rows",
            b"".join(pieces),
            prompt=prompt,
            completion=completion,
            finished=finished,
            rows=stop - start,
            planes=planes,
        )
        return frame, positions.tolist()

    def close(self) -> None:
        """End the result where a prompt has not ended, or never began, with its HTTP request."""
        self._results.end(self.result, ABORTED)

    def end(self, prompt: int, tokens: asynchronous.Tokens, error: str = "") -> None:
        """Say that a prompt has ended; the first error ends the result of all."""
        self._pending -= 1
        if error and not self._error:
            self._error = self.handle["error"] = error
            self._results.end(self.result, error)
        if not self._error:
            try:
                for one in tokens.outputs:
                    self._choice(prompt, one.index)
                    frame = body.encode(
                        "choice",
                        request_id=tokens.request_id,
                        prompt=prompt,
                        completion=one.index,
                        prompt_token_ids=tokens.prompt_token_ids,
                        token_ids=one.token_ids,
                    )
                    self._results.add(self.result, frame)
            except BudgetError as full:
                self._error = self.handle["error"] = str(full)
                self._results.end(self.result, self._error)
        self.handle["choices"][:] = [
            {**choice, "positions": ranges(choice["positions"])} for _, choice in sorted(self._choices.items())
        ]
        if not self._pending and not self._error:
            self._results.end(self.result)


class Captures:
    """Takes the place of `generate` of an engine client."""

    def __init__(self, llm: Any, lives: Lives, results: Results, settings: Settings, metrics: Metrics) -> None:
        self._llm, self._lives, self._results, self._metrics = llm, lives, results, metrics
        self._settings, self._default = settings, settings.default_spec
        self._generate = llm.generate
        llm.generate = self.generate

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        """Return the outputs of a request, which is captured if it asks for that.

        Raises:
            HTTPException: It cannot be captured.
        """
        spec = self._spec_of(sampling_params)
        if spec is None:
            return self._generate(prompt, sampling_params, request_id, **options)
        self._check(spec, prompt, sampling_params)
        call = current.get() or Call("", "")
        if call.reply is None:
            call.reply = self._open(call, request_id, spec)
        number = call.reply.expect()
        return self._captured(call.reply, number, spec, prompt, sampling_params, request_id, options)

    def _spec_of(self, params: Any) -> Spec | None:
        """Return what a request asks for."""
        extra = getattr(params, "extra_args", None) or {}
        if KEY not in extra:
            return self._default if self._settings.captures == "allow" else None
        given = extra[KEY]
        if self._settings.captures == "forbid":
            raise self._refused(HTTPStatus.FORBIDDEN, "this server takes no captures: leave vllm_tap out.")
        # A list would be taken for the mark of a capture, perhaps of another client.
        if not isinstance(given, str):
            raise self._refused(
                HTTPStatus.BAD_REQUEST, f"vllm_xargs: vllm_tap is a Spec as JSON text, got a {type(given).__name__}."
            )
        try:
            return Spec.from_json(given)
        except SpecError as error:
            raise self._refused(HTTPStatus.BAD_REQUEST, f"vllm_xargs: vllm_tap: {error}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise self._refused(HTTPStatus.BAD_REQUEST, f"vllm_xargs: vllm_tap is no JSON: {error}") from None

    def _check(self, spec: Spec, prompt: Any, params: Any) -> None:
        """Refuse what is known not to be possible before anything runs."""
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        if ids is None:
            raise self._refused(HTTPStatus.BAD_REQUEST, "a prompt without token ids cannot be captured.")
        try:
            resolve(self._lives.connection, spec)
            missing.check_params(spec, params, 0)
            if not prompt.get("mm_kwargs"):
                missing.check_prompts(spec, [{"prompt_token_ids": ids}])
        except TapError as error:
            raise self._refused(HTTPStatus.BAD_REQUEST, str(error)) from None
        if spec not in self._lives and len(self._lives) >= self._settings.max_specs:
            raise self._refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{len(self._lives)} different Specs are captured now, which is the most: try again, or ask for what "
                "others ask for.",
            )

    def _streams(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """Return the layers of the streams that rows of a Spec have."""
        layers = resolve(self._lives.connection, spec)
        return {name: layers[stream] for name, stream in streams_made(spec, layers).items()}

    def _open(self, call: Call, request_id: str, spec: Spec) -> Reply:
        # vLLM puts the number of the prompt behind the id of a reply with completions.
        name = request_id.rpartition("-")[0] if request_id.startswith("cmpl-") else request_id
        names = {call.name, name} - {""}
        try:
            result = self._results.open(call.key, names)
        except BudgetError as error:
            raise self._refused(HTTPStatus.TOO_MANY_REQUESTS, str(error)) from None
        except ValueError as error:
            raise self._refused(HTTPStatus.CONFLICT, str(error)) from None
        return Reply(self._results, result, self._streams(spec))

    async def _captured(
        self,
        reply: Reply,
        number: int,
        spec: Spec,
        prompt: Any,
        params: Any,
        request_id: str,
        options: dict[str, Any],
    ) -> AsyncGenerator[Any, None]:
        """Yield the outputs of a request, and put its rows into the reply as they come."""
        tokens = asynchronous.Tokens(asynchronous.is_delta(params))
        error = ABORTED
        options = {**options, **asynchronous.route(self._llm)}
        self._metrics.requests.inc()
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    request = await stack.enter_async_context(self._lives.request(spec, params))
                except TapError as failed:
                    error = str(failed)
                    raise self._refused(_status_of(failed), error) from failed
                outputs = self._generate(prompt, request.params, request_id, **options)
                await stack.enter_async_context(contextlib.aclosing(outputs))
                error = ""
                async for output in outputs:
                    tokens.add(output)
                    if not error:
                        error = await self._take(reply, number, request, tokens, params.n or 1)
                    if output.finished:
                        reply.end(number, tokens, error)
                        number = -1
                        output.kv_transfer_params = {**(output.kv_transfer_params or {}), KEY: reply.handle}
                    yield output
        finally:
            if number >= 0:
                reply.end(number, tokens, error or ABORTED)

    async def _take(self, reply: Reply, number: int, request: Any, tokens: Any, num_completions: int) -> str:
        """Put rows that there are into the reply; return what kept them from it."""
        try:
            if num_completions == 1:
                captured = await request.rows(tokens)
            else:
                captured = await request.result(tokens) if tokens.finished else None
            if captured is not None:
                num_rows, num_bytes = reply.add(number, captured, tokens.finished)
                self._metrics.rows.inc(num_rows)
                self._metrics.bytes.inc(num_bytes)
        except TapError as error:
            self._metrics.failures.inc()
            return str(error)
        return ""

    def _refused(self, status: HTTPStatus, message: str) -> HTTPException:
        self._metrics.refusals.inc()
        return HTTPException(status_code=status.value, detail=message)


def _status_of(error: TapError) -> HTTPStatus:
    is_theirs = isinstance(error, SpecError | PositionError)
    return HTTPStatus.BAD_REQUEST if is_theirs else HTTPStatus.SERVICE_UNAVAILABLE


def _begin(name: str, captured: Capture) -> bytes:
    """Return the first frame of a body."""
    return body.encode(
        "begin",
        id=name,
        spec=json.loads(captured.spec.to_json()),
        num_layers=captured.num_layers,
        layers=captured.layers,
        conventions=captured.conventions,
        has_final_norm=captured.has_final_norm,
        routing=msgspec.to_builtins(captured.routing, str_keys=True),
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ranges(positions: list[int]) -> list[list[int]]:
    """Return ascending positions as half-open ranges [begin, end]."""
    numbers = np.array(positions, np.int64)
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(numbers, breaks) if len(run)]
