"""Captures of requests that a server runs: around `AsyncLLM.generate`. In each API process, in its event loop."""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import msgspec
from fastapi import HTTPException  # vLLM answers to this one as to its own errors

from vllm_tap.client import missing
from vllm_tap.client.engines import Engines
from vllm_tap.client.expected_rows import num_rows
from vllm_tap.client.layers import resolve
from vllm_tap.client.lives import Lives
from vllm_tap.client.reduced import streams_made
from vllm_tap.client.tasks import Tasks
from vllm_tap.errors import BudgetError, PositionError, SpecError, TapError
from vllm_tap.labels import KEY
from vllm_tap.serve.files import FileReply
from vllm_tap.serve.metrics import Metrics
from vllm_tap.serve.reply import Replies, Reply
from vllm_tap.serve.results import Results
from vllm_tap.serve.running import Running
from vllm_tap.serve.settings import Settings
from vllm_tap.spec import Spec
from vllm_tap.vllm import asynchronous

BEAM: Final = re.compile(r"-[0-9a-f]+-beam-\d+$")
"""End of the ids of requests that vLLM makes for the beams of one."""

SPELT_ALIKE: Final = 0.9
"""Likeness of two keys, of which 1 is the most: above it, a letter of ours is missing or there is one more."""

TEXT: Final = """a Spec as JSON text, such as '{"hidden_states": [8, -1]}'"""

NUMBER: Final = {"cmpl-": "-", "resp_": "_"}
"""Sign between the id of a reply and the number of a prompt or turn, by the beginning of the id."""


class Call:
    """An HTTP request that may ask for rows: who sent it, and what it gets.

    Attributes:
        key: Digest of its API key.
        name: The X-Request-Id that the client chose.
        reply: Of its captured prompts.
    """

    def __init__(self, key: str, name: str) -> None:
        self.key, self.name = key, name
        self.reply: Replies | None = None


current: contextvars.ContextVar[Call | None] = contextvars.ContextVar("vllm_tap_call", default=None)
"""The HTTP request that this task handles."""


class Captures:
    """Takes the place of `generate` of an engine client."""

    def __init__(self, llm: Any, engines: Engines, results: Results, settings: Settings, metrics: Metrics) -> None:
        self._llm, self._engines, self._results, self._metrics = llm, engines, results, metrics
        self._settings, self._default = settings, settings.default_spec
        self._tasks = Tasks()
        self._generate = llm.generate
        llm.generate = self.generate

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> Any:
        """Return the outputs of a request, which is captured if it asks for that.

        Raises:
            HTTPException: It cannot be captured.
        """
        spec = self._spec_of(sampling_params, request_id)
        if spec is None:
            return self._generate(prompt, sampling_params, request_id, **options)
        self._check(spec, prompt, sampling_params)
        able = self._able(spec, options.get("data_parallel_rank"))
        call = current.get() or Call("", "")
        if call.reply is None:
            call.reply = self._open(call, request_id, spec, sampling_params)
        running = Running(call.reply, sampling_params, self._metrics, self._tasks)
        most_rows = _most_rows(spec, len(prompt["prompt_token_ids"]), sampling_params)

        def start(params: Any, engine: int) -> AsyncGenerator[Any, None]:
            given = {**options, **asynchronous.route(self._llm, engine)}
            return self._generate(prompt, params, request_id, **given)  # type: ignore[no-any-return]

        return self._captured(running, spec, sampling_params, most_rows, able, start)

    def _able(self, spec: Spec, asked: int | None) -> list[Lives]:
        """Return the engines that can capture a Spec now: of all, or the one that the client asks for."""
        lives = self._engines.lives
        if asked is not None and asynchronous.num_engines(self._llm) > 1:
            lives = [one for one in lives if one.engine == asked]
            if not lives:
                ranks = ", ".join(str(one.engine) for one in self._engines.lives)
                message = f"data parallel rank {asked} captures nothing: ask for one of {ranks}, or for none."
                raise self._refused(HTTPStatus.BAD_REQUEST, message)
        able = [one for one in lives if spec in one or len(one) < self._settings.max_specs]
        if not able:
            raise self._refused(
                HTTPStatus.TOO_MANY_REQUESTS,
                f"{self._settings.max_specs} different Specs are captured now, which is the most: try again, or ask "
                "for what others ask for.",
            )
        return able

    def _spec_of(self, params: Any, request_id: str) -> Spec | None:
        """Return what a request asks for."""
        extra = getattr(params, "extra_args", None) or {}
        self._refuse_no_text(extra)
        if KEY not in extra:
            self._refuse_misspelt(extra)
            return None if self._settings.captures == "forbid" or BEAM.search(request_id) else self._default
        given = extra[KEY]
        if self._settings.captures == "forbid":
            raise self._refused(HTTPStatus.FORBIDDEN, "this server takes no captures: leave vllm_tap out.")
        # A list would be taken for the mark of a capture, perhaps of another client.
        if not isinstance(given, str):
            raise self._refused(HTTPStatus.BAD_REQUEST, f"vllm_xargs: vllm_tap is {TEXT}, got {given!r:.100}.")
        try:
            return Spec.from_json(given)
        except SpecError as error:
            raise self._refused(HTTPStatus.BAD_REQUEST, f"vllm_xargs: vllm_tap: {error}") from None
        except (ValueError, TypeError, RecursionError) as error:
            raise self._refused(HTTPStatus.BAD_REQUEST, f"vllm_xargs: vllm_tap is {TEXT}: {error}") from None

    def _refuse_no_text(self, extra: Mapping[str, Any]) -> None:
        """Refuse what has letters that no encoding has: vLLM fails when it sends them to the engine."""
        try:
            msgspec.json.encode([*extra, *extra.values()])
        except UnicodeEncodeError as error:
            raise self._refused(HTTPStatus.BAD_REQUEST, f"vllm_xargs has letters that are no text: {error}") from None
        except TypeError:  # other programs' objects
            return

    def _refuse_misspelt(self, extra: Mapping[str, Any]) -> None:
        """Refuse our key in another spelling or with a letter more or less: it would be dropped without a word."""
        for name in extra:
            letters = name.lower().replace("-", "").replace("_", "")
            if difflib.SequenceMatcher(None, letters, KEY.replace("_", "")).ratio() > SPELT_ALIKE:
                raise self._refused(HTTPStatus.BAD_REQUEST, f"vllm_xargs has {name!r}. Did you mean {KEY!r}?")

    def _check(self, spec: Spec, prompt: Any, params: Any) -> None:
        """Refuse what is known not to be possible before anything runs."""
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        if ids is None:
            raise self._refused(HTTPStatus.BAD_REQUEST, "a prompt without token ids cannot be captured.")
        try:
            resolve(self._engines.connection, spec)
            missing.check_params(spec, params, 0)
            if not prompt.get("mm_kwargs"):
                missing.check_prompts(spec, [{"prompt_token_ids": ids}])
        except TapError as error:
            raise self._refused(HTTPStatus.BAD_REQUEST, str(error)) from None

    def _streams(self, spec: Spec) -> dict[str, tuple[int, ...]]:
        """Return the layers of the streams that rows of a Spec have."""
        layers = resolve(self._engines.connection, spec)
        return {name: layers[stream] for name, stream in streams_made(spec, layers).items()}

    def _open(self, call: Call, request_id: str, spec: Spec, params: Any) -> Replies:
        if self._settings.hidden_states_folder and KEY not in (params.extra_args or {}):
            return FileReply(Path(self._settings.hidden_states_folder), self._settings.ttl_s)
        sign = next((sign for start, sign in NUMBER.items() if request_id.startswith(start)), None)
        name = request_id.rpartition(sign)[0] if sign else request_id
        try:
            names = dict.fromkeys(filter(None, (call.name, name)))
            result = self._results.open(call.key, names, is_named=bool(call.name))
        except BudgetError as error:
            raise self._refused(HTTPStatus.TOO_MANY_REQUESTS, str(error)) from None
        except ValueError as error:
            raise self._refused(HTTPStatus.CONFLICT, str(error)) from None
        # Streams of tokens do not carry the reply's handle.
        inline_bytes = 0 if asynchronous.is_delta(params) else self._settings.inline_bytes
        return Reply(self._results, result, self._streams(spec), inline_bytes)

    async def _captured(
        self,
        running: Running,
        spec: Spec,
        params: Any,
        most_rows: int,
        able: list[Lives],
        start: Callable[[Any, int], AsyncGenerator[Any, None]],
    ) -> AsyncGenerator[Any, None]:
        """Yield the outputs of a request, whose rows go into its reply as they come.

        It begins when the workers have room for as many rows as may be there at once, in the least busy of the engines
        that are able to.
        """
        lives = self._engines.least_busy(able)
        try:
            async with contextlib.AsyncExitStack() as stack:
                try:
                    request = await stack.enter_async_context(lives.request(spec, params))
                    stack.callback(request.left)
                    with contextlib.nullcontext() if request.has_room(most_rows) else running.stall():
                        await request.begin(most_rows)
                except TapError as error:
                    running.error = str(error)
                    raise self._refused(_status_of(error), running.error) from error
                running.begin()
                async for output in await stack.enter_async_context(
                    contextlib.aclosing(start(request.params, lives.engine))
                ):
                    await running.take(request, output)
                    yield output
        finally:
            running.leave()

    def _refused(self, status: HTTPStatus, message: str) -> HTTPException:
        self._metrics.refusals.inc()
        return HTTPException(status_code=status.value, detail=message)


def _most_rows(spec: Spec, num_prompt: int, params: Any) -> int:
    """Return how many rows of a request may be in the workers at once: of its prompt, or all where they stay there."""
    completions = params.n or 1
    stay = completions > 1 or spec.needs_end or spec.reduce is not None
    return completions * num_rows(spec.positions, num_prompt, params.max_tokens or 1 if stay else 1)


def _status_of(error: TapError) -> HTTPStatus:
    is_theirs = isinstance(error, SpecError | PositionError)
    return HTTPStatus.BAD_REQUEST if is_theirs else HTTPStatus.SERVICE_UNAVAILABLE
