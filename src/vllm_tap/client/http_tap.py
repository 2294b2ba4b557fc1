"""`HttpTap`: captures from vLLM's server, over HTTP. In a process without the engine; needs httpx."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, Final

import msgspec
import numpy as np
import torch

from vllm_tap.client.owned import OwnedRows, Place
from vllm_tap.client.result import Capture, Sample
from vllm_tap.client.sequences import Sequences
from vllm_tap.client.tap import RowBlock
from vllm_tap.errors import CaptureError, DescriptorError, RowsMissingError, TransportError
from vllm_tap.frame import body
from vllm_tap.frame.routing import Routing
from vllm_tap.labels import KEY
from vllm_tap.spec import Spec

ROUTE: Final = "/v1/tap/rows"

MAX_ROWS: Final = 1 << 24
DTYPES: Final = {"float8_e4m3fn", "bfloat16", "float16", "float32", "float64", "uint8", "int16", "int32", "int64"}


class HttpTap:
    """Captures from a server that `vllm-tap serve` has started.

    Requests go through any client; this one says what they are to contain, and reads the rows.

    Args:
        base_url: Of the server, with or without `/v1`.
        api_key: As the server wants it.
        timeout_s: Seconds without a byte after which a read ends.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, timeout_s: float = 60.0) -> None:
        self._base = base_url.rstrip("/").removesuffix("/v1")
        self._options: dict[str, Any] = {
            "headers": {"Authorization": f"Bearer {api_key}"} if api_key else {},
            "timeout": timeout_s,
        }

    @staticmethod
    def extra_body(spec: Spec) -> dict[str, Any]:
        """Return what a request has beside the fields of OpenAI: `create(..., extra_body=tap.extra_body(spec))`."""
        return {"vllm_xargs": {KEY: spec.to_json()}}

    def samples(self, response: Any) -> list[Sample]:
        """Return the rows of all choices of a reply, in its order: prompts, and completions of each.

        Args:
            response: Of `completions.create` or `chat.completions.create`, or a dict of it; of a stream its id, or the
                X-Request-Id that was sent.

        Returns:
            list[Sample]: samples that own their rows; `output` has `prompt_token_ids`, and `outputs` with `token_ids`.

        Raises:
            CaptureError: The server could not capture; or the reply has no rows.
            TransportError: It cannot be reached, or refuses.
        """
        reader = _Samples()
        for frame in self._frames(_name_of(response)):
            reader.add(frame)
        return reader.samples()

    async def samples_async(self, response: Any) -> list[Sample]:
        """Return what `samples` does."""
        reader = _Samples()
        async for frame in self._frames_async(_name_of(response)):
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
        reader = _Blocks()
        for frame in self._frames(request_id, wait=wait_s):
            yield from reader.add(frame)

    async def stream_rows_async(self, request_id: str, *, wait_s: float = 30.0) -> AsyncGenerator[RowBlock, None]:
        """Yield what `stream_rows` does."""
        reader = _Blocks()
        async for frame in self._frames_async(request_id, wait=wait_s):
            for block in reader.add(frame):
                yield block

    def delete(self, response: Any) -> None:
        """Let go of the rows of a reply in the server.

        Raises:
            TransportError: There are none, or the server cannot be reached.
        """
        httpx = _httpx()
        with _told(httpx), httpx.Client(**self._options) as client:
            _check(client.delete(self._url(_name_of(response))))

    def _url(self, name: str) -> str:
        return f"{self._base}{ROUTE}/{name}"

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


class _Choices:
    """Frames of a body, read one after another."""

    def __init__(self) -> None:
        self._facts: dict[str, Any] | None = None

    def _begun(self, head: Mapping[str, Any]) -> bool:
        """Take the frames that are of no choice; return whether this is one of those."""
        if head["kind"] == "error":
            raise CaptureError(f"the server could not capture: {head['message']}")
        if head["kind"] == "begin":
            self._facts = {
                "spec": Spec.from_json(json.dumps(head["spec"])),
                "conventions": head["conventions"],
                "routing": msgspec.convert(head["routing"], dict[int, Routing], strict=False),
                "streams": list(head["layers"]),
                "num_layers": head["num_layers"],
                "has_final_norm": head["has_final_norm"],
            }
            return True
        return bool(head["kind"] == "end")

    @property
    def facts(self) -> dict[str, Any]:
        """The capture."""
        if self._facts is None:
            raise DescriptorError("a body of rows does not say what it has before it begins")
        return self._facts

    def _capture(self, prompt: int, output: Any, sequences: Sequences, tensors: dict[Place, torch.Tensor]) -> Capture:
        facts = self.facts
        result = Capture(
            facts["spec"],
            [output],
            sequences,
            [OwnedRows(tensors)],
            facts["conventions"],
            facts["routing"],
            facts["streams"],
            facts["num_layers"],
            facts["has_final_norm"],
        )
        result.first_sample = prompt
        return result


class _Samples(_Choices):
    """Whole choices."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[tuple[int, int], list[_Rows]] = {}
        self._samples: dict[tuple[int, int], Sample] = {}

    def add(self, frame: body.Frame) -> None:
        head = frame.head
        with _malformed():
            if self._begun(head):
                return
            place = head["prompt"], head["completion"]
            if head["kind"] == "rows":
                self._rows.setdefault(place, []).append(_Rows(frame))
            else:
                self._samples[place] = self._sample(head, *place)

    def _sample(self, head: Mapping[str, Any], prompt: int, completion: int) -> Sample:
        one = SimpleNamespace(index=completion, token_ids=head["token_ids"])
        output = SimpleNamespace(
            request_id=head["request_id"], prompt_token_ids=head["prompt_token_ids"], outputs=[one]
        )
        sequences = Sequences([output], self.facts["spec"].positions)
        blocks = self._rows.pop((prompt, completion), [])
        _, positions = sequences.position_of(sequences.wanted)
        come = np.concatenate([np.empty(0, np.int32), *(block.positions for block in blocks)])
        if come.tolist() != positions.tolist():
            raise RowsMissingError(
                f"prompt {prompt}, completion {completion}: {len(come)} rows came of {len(positions)}. Ask again.",
                sample=prompt,
            )
        tensors = {
            key: torch.cat([block.tensors[key] for block in blocks]) for key in (blocks[0].tensors if blocks else ())
        }
        return self._capture(prompt, output, sequences, tensors).sample(0, completion)

    def samples(self) -> list[Sample]:
        return [sample for _, sample in sorted(self._samples.items(), key=lambda item: item[0])]


class _Blocks(_Choices):
    """Rows of choices as they come."""

    def add(self, frame: body.Frame) -> Iterable[RowBlock]:
        head = frame.head
        with _malformed():
            if self._begun(head):
                return []
            if head["kind"] == "choice":
                return []
            rows = _Rows(frame)
            output = SimpleNamespace(request_id="", outputs=[], prompt_token_ids=None)
            sequences = Sequences.of_rows(head["completion"], rows.positions, rows.token_ids)
            block = RowBlock(self._capture(head["prompt"], output, sequences, rows.tensors), 0)
            block.finished = bool(head["finished"])
            return [block]


class _Rows:
    """Rows of a frame, checked against its length."""

    def __init__(self, frame: body.Frame) -> None:
        head, self._data, self._end = frame.head, np.frombuffer(bytearray(frame.data), np.uint8), 0
        self._num = num_rows = int(head["rows"])
        if not 0 <= num_rows <= MAX_ROWS:
            raise ValueError(f"{num_rows} rows")
        self.positions, self.token_ids = self._array(1, "int32").numpy()[:, 0], self._array(1, "int32").numpy()[:, 0]
        self.tensors: dict[Place, torch.Tensor] = {
            (str(stream), int(layer)): self._array(int(width), dtype) for stream, layer, dtype, width in head["planes"]
        }
        if self._end != len(self._data):
            raise ValueError(f"{len(self._data)} bytes for {self._end}")

    def _array(self, width: int, dtype: str) -> torch.Tensor:
        if dtype not in DTYPES or width < 1:
            raise ValueError(f"rows of {width} elements of {dtype!r}")
        kind = getattr(torch, dtype)
        begin, self._end = self._end, self._end + self._num * width * kind.itemsize
        if self._end > len(self._data):
            raise ValueError(f"{len(self._data)} bytes for {self._end} and more")
        if begin == self._end:
            return torch.empty(0, width, dtype=kind)
        return torch.from_numpy(self._data[begin : self._end].copy()).view(kind).view(self._num, width)


class _malformed:  # noqa: N801 (a context manager)
    """Turn what a head lacks into one error."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if isinstance(error, KeyError | TypeError | ValueError | AttributeError) and not isinstance(
            error, DescriptorError
        ):
            raise DescriptorError(f"a frame of rows says what cannot be: {kind.__name__}: {error}") from error


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
    raise TransportError(f"the server answers {reply.status_code}: {message}", status=reply.status_code)


def _name_of(response: Any) -> str:
    """Return the name of the rows of a reply."""
    if isinstance(response, str):
        return response
    fields = response if isinstance(response, Mapping) else response.model_dump()
    handle = (fields.get("kv_transfer_params") or {}).get(KEY)
    if handle is None:
        raise CaptureError(
            "this reply has no rows: pass extra_body=tap.extra_body(spec) with the request, and start the server with "
            "vllm-tap serve."
        )
    if "error" in handle:
        raise CaptureError(f"the server could not capture: {handle['error']}")
    return str(handle["id"])
