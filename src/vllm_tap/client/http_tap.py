"""`HttpTap`: captures from vLLM's server, over HTTP. In a process without the engine; needs httpx."""

from __future__ import annotations

import base64
import functools
import urllib.parse
from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any, Final

from vllm_tap import codec as codecs
from vllm_tap.client.bodies import Blocks, Samples, malformed
from vllm_tap.client.result import Sample
from vllm_tap.client.tap import RowBlock
from vllm_tap.errors import CaptureError, SpecError, TransportError
from vllm_tap.frame import body
from vllm_tap.labels import KEY
from vllm_tap.spec import Spec

ROUTE: Final = "/v1/tap/rows"

OF_STREAM: Final = "Of a stream of tokens, pass the id that its chunks have."


class HttpTap:
    """Captures from a server that `vllm-tap serve` has started.

    Requests go through any client; this one says what they are to contain, and reads the rows. Each read and each
    deletion has a connection of its own: one that is kept may be closed by the server while a call goes out on it.

    Args:
        base_url: Of the server, with or without `/v1`.
        api_key: As the server wants it.
        timeout_s: Seconds without a byte after which a read ends.
        codec: In which rows travel, such as "bytesplit" to a distant host; "raw" for none.

    Raises:
        SpecError: That is no URL; or there is no such codec, or its package is not installed.
    """

    def __init__(
        self, base_url: str, *, api_key: str | None = None, timeout_s: float = 60.0, codec: str = "raw"
    ) -> None:
        if not str(base_url).startswith(("http://", "https://")):
            raise SpecError(f"base_url is a server's, such as http://localhost:8000, got {base_url!r}.")
        self._base = base_url.rstrip("/").removesuffix("/v1")
        codecs.get(codec)
        if not codecs.installed(codec):
            raise SpecError(f"codec {codec!r} needs a package: pip install 'vllm-tap[codecs]'.", codec=codec)
        # Named, since httpx asks for more by itself.
        headers = {"Accept-Encoding": "identity" if codec == "raw" else f"vtr-{codec}"}
        if api_key:
            headers["Authorization"] = f"Bearer {api_key}"
        self._given: dict[str, Any] = {"headers": headers, "timeout": timeout_s}

    @functools.cached_property
    def _options(self) -> dict[str, Any]:
        """Arguments of an httpx client. Each would read the certificates anew: 40 ms, in which an event loop waits."""
        return {**self._given, "verify": _httpx().create_ssl_context()}

    @staticmethod
    def extra_body(spec: Spec) -> dict[str, Any]:
        """Return what a request has beside the fields of OpenAI: `create(..., extra_body=tap.extra_body(spec))`.

        Raises:
            SpecError: Something else.
        """
        if not isinstance(spec, Spec):
            raise SpecError(f"extra_body takes a vllm_tap.Spec, got {type(spec).__name__}.")
        return {"vllm_xargs": {KEY: spec.to_json()}}

    def samples(self, response: Any, *, delete: bool = False) -> list[Sample]:
        """Return the rows of all choices of a reply, in its order: prompts, and completions of each.

        Args:
            response: Of `completions.create` or `chat.completions.create`, or a dict of it; of a stream its id, or the
                X-Request-Id that was sent.
            delete: Have the server let go of the rows as it sends them, which saves a call of `delete`. Rows that are
                lost on the way cannot be asked for again.

        Returns:
            list[Sample]: samples that own their rows; `output` has `prompt_token_ids`, and `outputs` with `token_ids`.

        Raises:
            CaptureError: The server could not capture; or the reply has no rows.
            SpecError: That is no reply.
            TransportError: It cannot be reached, or refuses.
        """
        reader = Samples()
        inline = _inline(response, delete)
        for frame in self._frames(_name_of(response), **_deleting(delete)) if inline is None else inline:
            reader.add(frame)
        return reader.samples()

    async def samples_async(self, response: Any, *, delete: bool = False) -> list[Sample]:
        """Return what `samples` does."""
        if _inline(response, delete) is not None:
            return self.samples(response, delete=delete)
        reader = Samples()
        async for frame in self._frames_async(_name_of(response), **_deleting(delete)):
            reader.add(frame)
        return reader.samples()

    def stream_rows(self, request_id: str, *, wait_s: float = 30.0) -> Generator[RowBlock, None, None]:
        """Yield rows of a request as they come.

        Args:
            request_id: The X-Request-Id that its sender chose, or the id of its reply.
            wait_s: Seconds in which the server may get it.

        Yields:
            RowBlock: consecutive rows of a choice; `index` is its prompt's number.

        Raises:
            CaptureError: The server could not go on.
            TransportError: It cannot be reached, or refuses.
        """
        reader = Blocks()
        for frame in self._frames(request_id, wait=wait_s):
            yield from reader.add(frame)

    async def stream_rows_async(self, request_id: str, *, wait_s: float = 30.0) -> AsyncGenerator[RowBlock, None]:
        """Yield what `stream_rows` does."""
        reader = Blocks()
        async for frame in self._frames_async(request_id, wait=wait_s):
            for block in reader.add(frame):
                yield block

    def delete(self, response: Any) -> None:
        """Let go of the rows of a reply in the server, which keeps none that are in the reply itself.

        Raises:
            TransportError: There are none, or the server cannot be reached.
        """
        if not isinstance(response, str) and "href" not in _handle_of(response):
            return
        httpx = _httpx()
        with _told(httpx), httpx.Client(**self._options) as client:
            _check(client.delete(self._url(_name_of(response))))

    def _url(self, name: str) -> str:
        return f"{self._base}{ROUTE}/{urllib.parse.quote(name, safe='')}"

    def _frames(self, name: str, **params: Any) -> Generator[body.Frame, None, None]:
        httpx, reader = _httpx(), body.Reader()
        with (
            _told(httpx),
            httpx.Client(**self._options) as client,
            client.stream("GET", self._url(name), params=params) as reply,
        ):
            if reply.status_code != 200:
                reply.read()
                _check(reply)
            for piece in reply.iter_bytes():
                yield from reader.feed(piece)
        reader.finish()

    async def _frames_async(self, name: str, **params: Any) -> AsyncGenerator[body.Frame, None]:
        httpx, reader = _httpx(), body.Reader()
        with _told(httpx):
            async with (
                httpx.AsyncClient(**self._options) as client,
                client.stream("GET", self._url(name), params=params) as reply,
            ):
                if reply.status_code != 200:
                    await reply.aread()
                    _check(reply)
                async for piece in reply.aiter_bytes():
                    for frame in reader.feed(piece):
                        yield frame
        reader.finish()


class _told:  # noqa: N801 (a context manager)
    """Turn failures of HTTP into one error."""

    def __init__(self, httpx: Any) -> None:
        self._kind = httpx.HTTPError

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: Any, error: Any, __: Any) -> None:
        if isinstance(error, self._kind):
            raise TransportError(f"the server cannot be reached, or ended: {type(error).__name__}: {error}") from error


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise TransportError("HttpTap needs httpx: pip install 'vllm-tap[http]'.") from None
    return httpx


def _check(reply: Any) -> None:
    """Refuse what is no success."""
    if reply.is_success:
        return
    try:
        told = reply.json()["error"]
        message = told["message"] if isinstance(told, dict) else told
    except (ValueError, KeyError, TypeError):
        message = reply.text[:500]
    if reply.status_code == 401:
        message = f"{message}: pass the api_key that the server was started with."
    raise TransportError(f"the server answers {reply.status_code}: {message}", status=reply.status_code)


def _handle_of(response: Any) -> Mapping[str, Any]:
    """Return what a reply says of its rows."""
    if not isinstance(response, Mapping) and not hasattr(response, "model_dump"):
        raise SpecError(f"expected a reply or an id of its rows, got {type(response).__name__}. {OF_STREAM}")
    fields = response if isinstance(response, Mapping) else response.model_dump()
    handle = (fields.get("kv_transfer_params") or {}).get(KEY)
    if handle is None:
        raise CaptureError(
            "this reply has no rows: pass extra_body=tap.extra_body(spec) with the request, and start the server with "
            f"vllm-tap serve. {OF_STREAM}"
        )
    if "error" in handle:
        raise CaptureError(f"the server could not capture: {handle['error']}")
    if "id" not in handle:
        raise CaptureError(f"the rows of this reply are in files of the server's: {handle.get('files')}.")
    return dict(handle)


def _deleting(delete: bool) -> dict[str, str]:
    """Return the parameters that have the server let go of what it sends."""
    return {"delete": "true"} if delete else {}


def _name_of(response: Any) -> str:
    """Return the name of the rows of a reply."""
    return response if isinstance(response, str) else str(_handle_of(response)["id"])


def _inline(response: Any, delete: bool) -> list[body.Frame] | None:
    """Return the frames that a reply has itself; not where the server has them, too, and is to let go of them."""
    handle = {} if isinstance(response, str) else _handle_of(response)
    data = handle.get("data")
    if data is None or (delete and "href" in handle):
        return None
    with malformed():
        return body.frames(base64.b64decode(data, validate=True))
