"""Routes of rows, and the middleware that says whose request is handled. In each API process."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any, Final

from fastapi import APIRouter, HTTPException, Request
from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse

from vllm_tap.errors import DescriptorError
from vllm_tap.frame import body
from vllm_tap.serve import bodies, formats
from vllm_tap.serve.captures import Call, current
from vllm_tap.serve.finder import Finder
from vllm_tap.serve.metrics import Metrics
from vllm_tap.serve.peers import Peers
from vllm_tap.serve.reply import ROUTE
from vllm_tap.serve.results import Results

MOST_WAIT_S: Final = 60.0

WHOLE_BYTES: Final = 1 << 20
"""Most bytes of a body that is sent at once."""


class Service:
    """Results of a server, and who may read them.

    Attributes:
        guarded: Whether the server wants an API key.
    """

    def __init__(self, results: Results, peers: Peers, metrics: Metrics, guarded: bool) -> None:
        self.results, self.peers, self.metrics, self.guarded = results, peers, metrics, guarded
        self.finder = Finder(results, peers)

    def key_of(self, headers: Headers) -> str:
        """Return the digest of the API key of a request; nothing where the server wants none."""
        if not self.guarded:
            return ""
        _, _, key = headers.get("authorization", "").partition(" ")
        return hashlib.sha256(key.encode()).hexdigest()


class Caller:
    """ASGI middleware: tells the handlers below whose request they handle."""

    def __init__(self, app: Any, holder: Any) -> None:
        self._app, self._holder = app, holder

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle a request."""
        service = self._holder.service
        if scope["type"] != "http" or service is None:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        call = Call(service.key_of(headers), headers.get("x-request-id", ""))
        token = current.set(call)
        try:
            await self._app(scope, receive, send)
        finally:
            current.reset(token)
            if call.reply is not None:
                call.reply.close()


def new_router(holder: Any) -> APIRouter:
    """Return the routes.

    Args:
        holder: Has the `service` once the server is up.
    """
    router = APIRouter()

    async def read(
        name: str,
        request: Request,
        wait: float = 0.0,
        format: str = "frames",
        stream: str = "",
        layer: int = 0,
        prompt: int = 0,
        completion: int = 0,
        delete: bool = False,
    ) -> Response:
        """Rows of a request: as they come, to its end."""
        service = _service(holder)
        if delete and (format != "frames" or "range" in request.headers):
            raise HTTPException(400, "delete=true is for a whole result: without Range, and as frames.")
        result = await service.finder.find(service.key_of(request.headers), name, min(wait, MOST_WAIT_S))
        if result is None:
            raise _unknown(name)
        service.metrics.reads.inc()
        total = result.total_bytes
        pieces: bodies.Pieces = result.read()
        if format == "frames":
            pieces = pieces if total is None else await _begun(pieces, name)
            if delete:
                pieces = sent(pieces, service, request, name)
            return await _body(request, pieces, total, is_framed=True)
        if format not in formats.NAMES:
            raise HTTPException(400, f"format is one of frames, {', '.join(formats.NAMES)}, got {format!r}.")
        whole = [frame async for frame in pieces]
        try:
            choice = formats.Choice(prompt, completion, stream, layer)
            data = await asyncio.to_thread(formats.NAMES[format], whole, choice)
        except LookupError as error:
            raise HTTPException(404, str(error.args[0])) from None
        except DescriptorError:  # another process let go of it meanwhile
            raise _unknown(name) from None
        return await _body(request, _once(data), len(data))

    async def delete(name: str, request: Request) -> None:
        """Let go of rows."""
        service = _service(holder)
        if not await let_go(service, service.key_of(request.headers), name):
            raise _unknown(name)

    async def let_go(service: Service, key: str, name: str) -> bool:
        is_here = service.results.delete(key, name) or await service.peers.delete(key, name)
        service.metrics.deletes.inc(is_here)
        return is_here

    async def sent(pieces: bodies.Pieces, service: Service, request: Request, name: str) -> bodies.Pieces:
        """Yield pieces, and let go of the rows before the last one, the end; not where the reader has left.

        Who has read all of a body then finds no rows any more.
        """
        last: body.Piece = b""
        async for piece in pieces:
            if last:
                yield last
            last = piece
        if not await request.is_disconnected():
            await let_go(service, service.key_of(request.headers), name)
        yield last

    router.add_api_route(ROUTE + "/{name:path}", read, methods=["GET"], response_class=StreamingResponse)
    router.add_api_route(ROUTE + "/{name:path}", delete, methods=["DELETE"], status_code=204)
    return router


async def _begun(pieces: bodies.Pieces, name: str) -> bodies.Pieces:
    """Return pieces of which the first one is there: the result may have gone since it was found."""
    async for first in pieces:
        return _chained(first, pieces)
    raise _unknown(name)


async def _chained(first: body.Piece, pieces: bodies.Pieces) -> bodies.Pieces:
    yield first
    async for piece in pieces:
        yield piece


async def _once(data: bytes) -> bodies.Pieces:
    yield data


async def _body(request: Request, pieces: bodies.Pieces, total: int | None, is_framed: bool = False) -> Response:
    """Return the reply of a body: what the request wants of it.

    Args:
        request: May have Range, which holds for a body whose end is known, and Accept-Encoding.
        pieces: Of the body.
        total: Bytes of it; None while more may come.
        is_framed: Whether it is one of frames.
    """
    headers = {"Vary": "Accept-Encoding"}
    wanted, status = None, 200
    if total is not None:
        headers["Accept-Ranges"] = "bytes"
        # If-Range: no body has a tag that it could name.
        given = "" if "if-range" in request.headers else request.headers.get("range", "")
        try:
            wanted = bodies.byte_range(given, total)
        except bodies.UnsatisfiableError:
            message = f"Range: {given[:100]!r} of {total} bytes."
            raise HTTPException(416, message, {"Content-Range": f"bytes */{total}"}) from None
    if wanted is not None:
        pieces, status = bodies.cut(pieces, *wanted), 206
        headers["Content-Range"] = f"bytes {wanted[0]}-{wanted[1] - 1}/{total}"
        total = wanted[1] - wanted[0]
    elif name := is_framed and bodies.coding(request.headers.get("accept-encoding", "")):
        pieces, total = bodies.encoded(pieces, name), None
        headers["Content-Encoding"] = name
    if total is not None:
        headers["Content-Length"] = str(total)
        if total <= WHOLE_BYTES:  # each piece on its own would take as long as all of them
            return Response(b"".join([piece async for piece in pieces]), status, headers, media_type=body.MEDIA_TYPE)
    return StreamingResponse(pieces, status, headers, media_type=body.MEDIA_TYPE)


def _service(holder: Any) -> Service:
    service: Service | None = holder.service
    if service is None:
        raise HTTPException(503, f"this server captures nothing: {holder.why_not}")
    return service


def _unknown(name: str) -> HTTPException:
    return HTTPException(
        404, f"there are no rows {name[:100]!r}: they were deleted, their time is over, or they are of another API key."
    )
