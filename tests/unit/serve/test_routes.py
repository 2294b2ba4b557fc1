"""Routes of rows without an engine: who gets what, in one process and from another; what is written is read."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import CaptureError, DescriptorError, RowsMissingError, SpecError, TransportError
from vllm_tap.frame import body
from vllm_tap.spec import Spec

httpx = pytest.importorskip("httpx")
fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from vllm_tap import HttpTap  # noqa: E402
from vllm_tap.client.http_tap import _check  # noqa: E402
from vllm_tap.serve.peers import Peers  # noqa: E402
from vllm_tap.serve.reply import Reply  # noqa: E402
from vllm_tap.serve.results import Results  # noqa: E402
from vllm_tap.serve.routes import Caller, Service, new_router  # noqa: E402
from vllm_tap.serve.settings import Settings  # noqa: E402
from vllm_tap.vllm.asynchronous import Tokens  # noqa: E402

SPEC = Spec(hidden_states=[1, 3], positions="all")
COUNTERS = SimpleNamespace(**{name: SimpleNamespace(inc=lambda number=1: None) for name in ("reads", "deletes")})


class Process:
    """An API process with results of no engine: an event loop in a thread."""

    def __init__(self, addresses: list[str]) -> None:
        self.results, self.service = Results(Settings(ttl_s=1000)), None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        app = fastapi.FastAPI()
        app.include_router(new_router(self))
        app.add_middleware(Caller, holder=self)
        self._server = uvicorn.Server(uvicorn.Config(app, port=self.port, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._run, args=(addresses,), daemon=True)
        self._started = threading.Event()
        self._thread.start()
        assert self._started.wait(20)
        with contextlib.suppress(httpx.HTTPError):
            httpx.get(self.url)
        while not self._server.started:
            self._thread.join(0.01)

    url = property(lambda self: f"http://127.0.0.1:{self.port}")
    why_not = "it is a test."

    def _run(self, addresses: list[str]) -> None:
        async def main() -> None:
            self.loop = asyncio.get_running_loop()
            self.service = Service(self.results, Peers(self.results, addresses, self.loop), COUNTERS, guarded=True)
            self._started.set()
            await self._server.serve()

        asyncio.run(main())

    def do(self, function: Any) -> Any:
        """Run a function in the event loop and return what it returns."""

        async def inside() -> Any:
            done = function()
            return await done if asyncio.iscoroutine(done) else done

        return asyncio.run_coroutine_threadsafe(inside(), self.loop).result(20)

    def tap(self, key: str) -> HttpTap:
        """Return a tap with a key."""
        return HttpTap(self.url, api_key=key)

    def close(self) -> None:
        """End it."""
        self._server.should_exit = True
        self._thread.join(20)
        assert self.service is not None
        peers = self.service.peers
        for one in (peers._server, *peers._callers.values()):  # which a process has to its end
            one.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[list[Process]]:
    """Two API processes of one server."""
    worker = f"worker of {os.getpid()}"  # processes of a server find each other by it
    processes = [Process([worker]), Process([worker])]
    yield processes
    for process in processes:
        process.close()


def key_of(process: Process, key: str) -> str:
    """Return a key as the results know it."""
    from starlette.datastructures import Headers

    assert process.service is not None
    return process.service.key_of(Headers({"Authorization": f"Bearer {key}"}))


def captured(first: int, last: int, output: Any) -> Capture:
    """Return rows of some positions of a sequence."""
    sequences = Sequences([output], "all")
    sequences.wanted = sequences.wanted[first:last]
    sequences.wanted_starts = sequences.wanted_starts.__class__((2,), sequences.wanted_starts.dtype)
    sequences.wanted_starts[:] = 0, len(sequences.wanted)
    rows = {("hidden_states", layer): torch.arange(first, last)[:, None].repeat(1, 3) * 1.0 + layer for layer in (1, 3)}
    rows = {place: tensor.to(torch.bfloat16) for place, tensor in rows.items()}
    return Capture(SPEC, [output], sequences, [OwnedRows(rows)], {"hidden_states": "x"}, {}, ["hidden_states"], 4, True)


def fill(process: Process, key: str, name: str, end: int = 6, inline_bytes: int = 0) -> Reply:
    """Put a result of one prompt of 4 and 3 tokens into a process: rows of 6 positions."""
    tokens = Tokens(is_delta=True)
    one = SimpleNamespace(index=0, token_ids=[7, 8, 9])
    tokens.add(SimpleNamespace(request_id="r", finished=True, prompt_token_ids=[1, 2, 3, 4], outputs=[one]))

    async def inside() -> Reply:
        result = process.results.open(key_of(process, key), {name} - {""}, is_named=bool(name))
        reply = Reply(process.results, result, {"hidden_states": (1, 3)}, inline_bytes)
        number = reply.expect()
        await reply.add(number, captured(0, 4, tokens), False)
        await reply.add(number, captured(4, end, tokens), True)
        reply.end(number, tokens)
        return reply

    return process.do(inside)


@pytest.mark.parametrize("reader", [0, 1])
def test_any_process_hands_out_what_one_has(processes: list[Process], reader: int) -> None:
    """Rows, blocks, other formats; to the key that made them; until they are deleted."""
    reply = fill(processes[0], "mine", f"name-{reader}")
    handle, tap, url = reply.handle, processes[reader].tap("mine"), processes[reader].url
    assert handle["choices"] == [{"prompt": 0, "completion": 0, "positions": [[0, 6]]}]
    assert (handle["dtype"], handle["width"]) == ({"hidden_states": "bfloat16"}, {"hidden_states": 3})
    for response in ({"kv_transfer_params": {"vllm_tap": handle}}, f"name-{reader}"):
        (sample,) = tap.samples(response)
        assert sample.positions.tolist() == list(range(6))
        assert sample.token_ids.tolist() == [1, 2, 3, 4, 7, 8]
        assert sample.hidden_states[3][:, 0].tolist() == [3, 4, 5, 6, 7, 8]
        assert sample.hidden_states[-1].dtype == torch.bfloat16
    blocks = list(tap.stream_rows(handle["id"]))
    assert [block.positions.tolist() for block in blocks] == [[0, 1, 2, 3], [4, 5]]
    assert [block.finished for block in blocks] == [False, True]
    headers = {"Authorization": "Bearer mine"}
    npy = {"format": "npy", "stream": "hidden_states", "layer": 1}
    first = httpx.get(url + handle["href"], params=npy, headers=headers).content
    assert first[1:6] == b"NUMPY"
    assert httpx.get(url + handle["href"], params={**npy, "layer": -3}, headers=headers).content == first
    said = httpx.get(url + handle["href"], params={"format": "npy", "layer": -2}, headers=headers)
    assert said.status_code == 404
    assert "as in ?format=npy&stream=hidden_states&layer=8" in said.json()["detail"]
    assert "0.0.hidden_states.3" in said.json()["detail"]
    with pytest.raises(TransportError, match="404"):
        processes[reader].tap("other").samples(handle["id"])
    with pytest.raises(TransportError, match="404"):
        processes[reader].tap("other").delete(handle["id"])
    tap.delete(handle["id"])
    processes[0].do(lambda: None)
    for process in processes:
        with pytest.raises(TransportError, match="404"):
            process.tap("mine").samples(handle["id"])


@pytest.mark.parametrize("reader", [0, 1])
def test_a_range_of_a_body_is_cut_out_of_it(processes: list[Process], reader: int) -> None:
    """Once its end is known; in any format."""
    fill(processes[0], "mine", f"cut-{reader}")
    url, headers = f"{processes[reader].url}/v1/tap/rows/cut-{reader}", {"Authorization": "Bearer mine"}
    for params in ({}, {"format": "safetensors"}):
        whole = httpx.get(url, params=params, headers=headers)
        assert int(whole.headers["content-length"]) == len(whole.content)
        part = httpx.get(url, params=params, headers={**headers, "Range": "bytes=10-29"})
        assert (part.status_code, part.content) == (206, whole.content[10:30])
        assert part.headers["content-range"] == f"bytes 10-29/{len(whole.content)}"
        tail = httpx.get(url, params=params, headers={**headers, "Range": "bytes=-5"})
        assert (tail.status_code, tail.content) == (206, whole.content[-5:])
        none = httpx.get(url, params=params, headers={**headers, "Range": "bytes=100000-"})
        assert none.status_code == 416
        assert httpx.get(url, params=params, headers={**headers, "Range": "bytes=0-1", "If-Range": "x"}).content == (
            whole.content
        )
    key, results = key_of(processes[0], "mine"), processes[0].results
    open_one = processes[0].do(lambda: results.open(key, [f"open-{reader}"]))
    processes[0].do(lambda: results.add(open_one, body.encode("begin")))
    with httpx.stream("GET", url.replace("cut", "open"), headers={**headers, "Range": "bytes=0-3"}) as reply:
        assert reply.status_code == 200
        processes[0].do(lambda: results.end(open_one))
        assert reply.read() == body.encode("begin") + body.encode("end")


@pytest.mark.parametrize("num_bytes", [0, 3 << 20])
@pytest.mark.parametrize("reader", [0, 1])
def test_a_result_goes_as_it_is_sent_to_who_wants_that(
    processes: list[Process], reader: int, num_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, in one piece or in several, gone before its reader ends; not where a part was asked for, or it left."""
    delete = Peers.delete

    async def slow(peers: Peers, key: str, name: str) -> bool:
        await asyncio.sleep(0.3)
        return await delete(peers, key, name)

    monkeypatch.setattr(Peers, "delete", slow)
    name = f"once-{reader}-{num_bytes}"
    url, headers = f"{processes[reader].url}/v1/tap/rows/{name}", {"Authorization": "Bearer mine"}
    key, results = key_of(processes[0], "mine"), processes[0].results

    def fill_up() -> None:
        result = results.open(key, [name])
        for number in range(3):
            results.add(result, body.encode("rows", bytes([number]) * num_bytes))
        results.end(result)

    processes[0].do(fill_up)
    whole = httpx.get(url, headers=headers).content
    assert [len(frame.data) for frame in body.frames(whole)] == [num_bytes] * 3 + [0]
    for params, more in ({"format": "npy"}, {}), ({}, {"Range": "bytes=0-9"}):
        said = httpx.get(url, params={"delete": "true", **params}, headers=headers | more)
        assert (said.status_code, "whole result" in said.text) == (400, True)
    if num_bytes:
        with httpx.stream("GET", url, params={"delete": "true"}, headers=headers) as reply:
            next(reply.iter_raw(10))
    assert httpx.get(url, params={"delete": "true"}, headers=headers).content == whole
    for process in processes:
        assert httpx.get(f"{process.url}/v1/tap/rows/{name}", headers=headers).status_code == 404


@pytest.mark.parametrize("name", ["a/b", "a b?c#d", "%2F", "\u2603"])
@pytest.mark.parametrize("reader", [0, 1])
def test_a_name_may_have_any_letters(processes: list[Process], reader: int, name: str) -> None:
    """Clients choose it."""
    fill(processes[0], "mine", name)
    tap = processes[reader].tap("mine")
    assert len(tap.samples(name)[0]) == 6
    assert len(tap.samples(name, delete=True)[0]) == 6
    with pytest.raises(TransportError, match="404"):
        tap.samples(name)


def test_what_a_tap_cannot_use_is_told() -> None:
    """With what it takes."""
    tap = HttpTap("http://127.0.0.1:9")
    for url in ("localhost:8000", "", 5):
        with pytest.raises(SpecError, match="base_url is a server's, such as http://localhost:8000"):
            HttpTap(url)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match=r"takes a vllm_tap\.Spec, got dict"):
        HttpTap.extra_body({"hidden_states": [1]})  # type: ignore[arg-type]
    for given in (None, iter(())):
        with pytest.raises(SpecError, match=r"expected a reply .* Of a stream of tokens, pass the id"):
            tap.samples(given)
    with pytest.raises(CaptureError, match=r"has no rows.* Of a stream of tokens, pass the id"):
        tap.delete({"id": "cmpl-1", "choices": []})
    with pytest.raises(TransportError, match="401: Unauthorized: pass the api_key"):
        _check(httpx.Response(401, json={"error": "Unauthorized"}))


def test_calls_share_certificates_and_no_connection(
    processes: list[Process], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Reading certificates holds up an event loop; a kept connection may close while a call goes out on it."""
    loads: list[object] = []
    load = ssl.SSLContext.load_verify_locations
    monkeypatch.setattr(
        ssl.SSLContext, "load_verify_locations", lambda self, *args, **kw: [loads.append(self), load(self, *args, **kw)]
    )
    fill(processes[0], "mine", "certified")
    tap = processes[0].tap("mine")
    with caplog.at_level("DEBUG", "httpcore.connection"):
        tap.samples("certified")
        asyncio.run(tap.samples_async("certified"))
        list(tap.stream_rows("certified"))
        tap.delete("certified")
    assert len(loads) == 1
    assert caplog.text.count("connect_tcp.started") == 4


@pytest.mark.parametrize("codec", ["lz4", "zstd", "bytesplit"])
@pytest.mark.parametrize("reader", [0, 1])
def test_rows_travel_encoded_to_who_wants_that(processes: list[Process], reader: int, codec: str) -> None:
    """And are the same."""
    name = f"encoded-{reader}-{codec}"
    fill(processes[0], "mine", name)
    plain = processes[reader].tap("mine").samples(name)[0]
    (sample,) = HttpTap(processes[reader].url, api_key="mine", codec=codec).samples(name)
    for layer in (1, 3):
        assert torch.equal(sample.hidden_states[layer], plain.hidden_states[layer])
    headers = {"Authorization": "Bearer mine", "Accept-Encoding": f"vtr-{codec}"}
    sent = httpx.get(f"{processes[reader].url}/v1/tap/rows/{name}", headers=headers)
    assert sent.headers["content-encoding"] == f"vtr-{codec}"


def test_a_small_result_is_in_the_reply(processes: list[Process]) -> None:
    """And is kept only for who chose its name."""
    tap = HttpTap("http://127.0.0.1:9")  # nobody is asked
    for name in ("", "inline"):
        reply = fill(processes[0], "mine", name, inline_bytes=1 << 16)
        response = {"kv_transfer_params": {"vllm_tap": reply.handle}}
        (sample,) = tap.samples(response)
        (same,) = asyncio.run(tap.samples_async(response))
        assert torch.equal(sample.hidden_states[1], same.hidden_states[1])
        assert sample.positions.tolist() == list(range(6))
        assert ("href" in reply.handle) == bool(name)
        found = processes[0].results.peek(key_of(processes[0], "mine"), reply.handle["id"])
        assert (found is not None) == bool(name)
        (tap if not name else processes[1].tap("mine")).delete(response)
    large = fill(processes[0], "mine", "", inline_bytes=100)
    assert "data" not in large.handle
    with pytest.raises(TransportError):
        tap.samples({"kv_transfer_params": {"vllm_tap": large.handle}})
    broken = {**reply.handle, "data": "!"}
    with pytest.raises(DescriptorError):
        tap.samples({"kv_transfer_params": {"vllm_tap": broken}})


@pytest.mark.parametrize("reader", [0, 1])
def test_rows_are_read_while_they_come_by_who_waits_for_them(processes: list[Process], reader: int) -> None:
    """Before the request is there."""
    blocks: list[Any] = []
    name = f"later-{reader}"

    def read() -> None:
        blocks.extend(processes[reader].tap("mine").stream_rows(name))

    reading = threading.Thread(target=read)
    reading.start()
    fill(processes[0], "mine", name)
    reading.join(20)
    assert [len(block) for block in blocks] == [4, 2]


def test_many_readers_that_wait_ask_together(processes: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asks the other processes once; then one question has all their names, however many they are."""
    assert processes[1].service is not None
    peers, asked = processes[1].service.peers, []
    find = peers.find

    async def counted(names: Any) -> Any:
        asked.append(len(names))
        return await find(names)

    monkeypatch.setattr(peers, "find", counted)
    num = 60

    async def run() -> list[int]:
        async with httpx.AsyncClient(headers={"Authorization": "Bearer mine"}, timeout=60) as client:
            url = f"{processes[1].url}/v1/tap/rows"
            waiting = [client.get(f"{url}/late-{one}", params={"wait": 20 if one < 2 else 0.5}) for one in range(num)]
            tasks = [asyncio.ensure_future(one) for one in waiting]
            while len(asked) < num:
                await asyncio.sleep(0.01)
            for one, process in enumerate(processes):
                await asyncio.to_thread(fill, process, "mine", f"late-{one}")
            return [reply.status_code for reply in await asyncio.gather(*tasks)]

    assert asyncio.run(run()) == [200, 200] + [404] * (num - 2)
    assert max(asked) > num / 2
    assert all(process.results.delete(key_of(process, "mine"), f"late-{n}") for n, process in enumerate(processes))


@pytest.mark.parametrize("params", [{}, {"format": "safetensors"}, {"format": "npy"}])
def test_what_goes_before_it_is_read_is_not_found(
    processes: list[Process], monkeypatch: pytest.MonkeyPatch, params: dict[str, str]
) -> None:
    """Where another process has it, which lets go of it between the question where it is and that for its frames."""
    fill(processes[0], "mine", "going")
    assert processes[1].service is not None
    finder = processes[1].service.finder
    find = finder.find

    async def and_delete(*given: Any) -> Any:
        found = await find(*given)
        assert await processes[1].service.peers.delete(key_of(processes[1], "mine"), "going")
        return found

    monkeypatch.setattr(finder, "find", and_delete)
    headers = {"Authorization": "Bearer mine"}
    reply = httpx.get(f"{processes[1].url}/v1/tap/rows/going", headers=headers, params=params)
    assert reply.status_code == 404
    assert "no rows 'going'" in reply.json()["detail"]


def test_what_waits_fails_with_what_failed(processes: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait on; and the next reader is served."""
    assert processes[0].service is not None
    finder = processes[0].service.finder
    tried: list[Any] = []

    async def look(names: Any) -> Any:
        tried.append(names)
        if len(tried) > 1:
            raise OSError("no more files")
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(finder, "_look", look)
        with pytest.raises(OSError, match="no more files"):
            processes[0].do(lambda: finder.find("key", "name", 20))
    assert processes[0].do(lambda: finder.find("key", "name", 0.1)) is None
    assert processes[0].do(lambda: finder.find("key", "x" * 2000, 20)) is None


def test_what_ended_early_or_lacks_rows_is_told(processes: list[Process]) -> None:
    """And never partial in silence."""
    reply = fill(processes[0], "mine", "short", end=5)
    with pytest.raises(RowsMissingError, match="5 rows came of 6"):
        processes[1].tap("mine").samples("short")
    failed = processes[0].do(lambda: processes[0].results.open(key_of(processes[0], "mine"), ["failed"]))
    processes[0].do(lambda: processes[0].results.end(failed, "it broke"))
    for process in processes:
        with pytest.raises(CaptureError, match="it broke"):
            process.tap("mine").samples("failed")
    with pytest.raises(CaptureError, match="has no rows"):
        processes[0].tap("mine").samples({"id": "x"})
    with pytest.raises(CaptureError, match="in files of the server's"):
        processes[0].tap("mine").samples({"kv_transfer_params": {"vllm_tap": {"files": []}}})
    with pytest.raises(TransportError, match="cannot be reached"):
        HttpTap("http://127.0.0.1:9").samples("x")
    with pytest.raises(SpecError, match="no codec 'gzip'"):
        HttpTap("http://127.0.0.1:9", codec="gzip")
    assert body.frames(b"".join(map(bytes, reply.result.frames)))[-1].head == {"kind": "end"}
