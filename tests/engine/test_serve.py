"""Rows over HTTP from vLLM's server, through the unmodified openai client: one server for all tests.

The server is a process of its own; a tiny Llama with a tokenizer of bytes runs in it on the CPU.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import device
from engine.engines import ARGUMENTS, TOLERANCE, References, error, expected_rows
from vllm_tap import HttpTap, Sample, Spec
from vllm_tap.errors import CaptureError, TransportError

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

pytestmark = [pytest.mark.engine, pytest.mark.skipif(device.ON_CUDA, reason="the server runs on the CPU")]

KEY = "a-key"
COMMAND = "import sys; from vllm_tap.cli import command; sys.exit(command())"
START_S = 300.0
TTL_S = 20.0  # time enough to read a result, on a busy machine
SPEC = Spec(hidden_states="all", embeddings=True)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
SETTINGS = {"vllm_tap_serve": {"ttl_s": TTL_S, "max_bytes": 4 << 20, "max_results": 32, "max_specs": 4}}


class Server:
    """A server of `vllm-tap serve`."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        template = log.with_name("template.jinja")
        template.write_text(TEMPLATE)
        options = {
            **{name.replace("_", "-"): value for name, value in ARGUMENTS.items()},
            "api-server-count": 2, "port": port, "host": "127.0.0.1", "api-key": KEY, "served-model-name": "tiny",
            "chat-template": template, "generation-config": "vllm", "additional-config": json.dumps(SETTINGS),
        }  # fmt: skip
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, "-c", COMMAND, "serve", str(folder), "--enforce-eager", *arguments]
        self._log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if httpx.get(self.url.replace("/v1", "/health"), timeout=1).status_code == 200:
                    return
            except httpx.HTTPError:
                time.sleep(0.2)
        self.close()
        raise AssertionError(self._log.read_text()[-4000:])

    def get(self, path: str, key: str = KEY, **options: Any) -> Any:
        """Return a reply of the server."""
        return httpx.get(f"{self.url}{path}", headers={"Authorization": f"Bearer {key}"}, **options)

    def close(self) -> None:
        """End it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def server(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server."""
    server = Server(tiny_model("llama"), tmp_path_factory.mktemp("serve") / "log")
    yield server
    server.close()


@pytest.fixture
def client(server: Server) -> Any:
    """A client as users have it."""
    return openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0)


@pytest.fixture
def tap(server: Server) -> HttpTap:
    """What reads the rows."""
    return HttpTap(server.url, api_key=KEY)


def compare(sample: Sample, references: Callable[[str], References]) -> None:
    """Compare all rows of a sample with Hugging Face's."""
    tokens = sample.output.prompt_token_ids + sample.output.outputs[0].token_ids[:-1]
    assert sample.token_ids.tolist() == tokens
    whole = references("llama").of(tokens)
    for layer in range(4):
        expected = expected_rows(whole, "hidden_states", layer)
        assert error(sample.hidden_states[layer], expected, expected.square().mean().sqrt()) < TOLERANCE
    expected = expected_rows(whole, "embeddings", 0)
    assert error(sample.embeddings, expected, expected.square().mean().sqrt()) < TOLERANCE


def test_replies_have_rows_of_hugging_face(
    server: Server, client: Any, tap: HttpTap, references: Callable[[str], References]
) -> None:
    """Two prompts, two completions, chat; and the tokens are those that come without a capture."""
    extra = tap.extra_body(SPEC)
    given = {"model": "tiny", "prompt": ["hello world", "one more"], **GREEDY}
    plain, reply = client.completions.create(**given), client.completions.create(**given, extra_body=extra)
    assert [choice.text for choice in reply.choices] == [choice.text for choice in plain.choices]
    for sample in tap.samples(reply):
        compare(sample, references)
    reply = client.completions.create(**{**given, "n": 2, "temperature": 1.0}, extra_body=extra)
    samples = tap.samples(reply)
    assert [(sample.index, sample.completion) for sample in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    handle = reply.kv_transfer_params["vllm_tap"]
    for sample, choice in zip(samples, handle["choices"], strict=True):
        compare(sample, references)
        assert choice["positions"] == [[0, len(sample)]]
    assert handle["dtype"] == {"hidden_states": "float32", "embeddings": "float32"}

    messages = [{"role": "user", "content": "hello"}]
    given = {"model": "tiny", "messages": messages, **GREEDY}
    plain, reply = client.chat.completions.create(**given), client.chat.completions.create(**given, extra_body=extra)
    assert reply.choices[0].message.content == plain.choices[0].message.content
    (sample,) = tap.samples(reply)
    compare(sample, references)
    assert plain.kv_transfer_params is None


def test_rows_come_while_tokens_stream(server: Server, tap: HttpTap, references: Callable[[str], References]) -> None:
    """To whoever chose the id of the request, or sees that of its reply; the whole is there afterwards."""

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        blocks: list[Any] = []
        first = asyncio.Event()

        async def read() -> None:
            async for block in tap.stream_rows_async("chosen-1"):
                blocks.append(block)
                first.set()

        reading = asyncio.create_task(read())
        stream = await client.completions.create(
            model="tiny", prompt="stream this", stream=True, **{**GREEDY, "max_tokens": 200},
            extra_body={**tap.extra_body(SPEC), "ignore_eos": True}, extra_headers={"X-Request-Id": "chosen-1"},
        )  # fmt: skip
        text, name, num_before = "", "", 0
        async for chunk in stream:
            text, name = text + chunk.choices[0].text, chunk.id
            if chunk.choices[0].finish_reason is None:
                num_before = len(blocks)
        await reading
        assert num_before > 0, "no row came before the last token"
        assert blocks[-1].finished
        (sample,) = await tap.samples_async(name)
        compare(sample, references)
        assert torch.cat([block.positions for block in blocks]).tolist() == sample.positions.tolist()
        for layer in range(4):
            assert torch.equal(torch.cat([block.hidden_states[layer] for block in blocks]), sample.hidden_states[layer])
        reply = await client.completions.create(
            model="tiny", prompt="stream this", **{**GREEDY, "max_tokens": 200}, extra_body={"ignore_eos": True}
        )
        assert reply.choices[0].text == text

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{", "no JSON"),
        ("[]", "is an object"),
        ('{"hidden": [1]}', "no field 'hidden'"),
        ('{"hidden_states": [9]}', "no layer 9"),
        ('{"router_logits": "all"}', "chooses no layer"),
        ('{"hidden_states": [0], "positions": [500]}', "no position 500"),
        ('{"hidden_states": [0], "positions": {"x": 1}}', "vllm_tap"),
        (["1-0-abc", 0, 1], "as JSON text"),
        (3, "as JSON text"),
        ("[" * 100_000, "vllm_tap"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_spec_refuses_is_a_bad_request(client: Any, given: Any, says: str, stream: bool) -> None:
    """With our sentence."""
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(
            model="tiny", prompt="hello", stream=stream, extra_body={"vllm_xargs": {"vllm_tap": given}}, **GREEDY
        )
    assert says in refused.value.response.json()["error"]["message"]


def test_rows_belong_to_the_key_and_end_with_their_time(server: Server, client: Any, tap: HttpTap) -> None:
    """401 without it; 404 when they were deleted, when their time is over, and for names that nobody has."""
    replies = [
        client.completions.create(model="tiny", prompt="hello", extra_body=tap.extra_body(SPEC), **GREEDY)
        for _ in range(2)
    ]
    paths = [reply.kv_transfer_params["vllm_tap"]["href"].removeprefix("/v1") for reply in replies]
    assert server.get(paths[0], key="other").status_code == 401
    assert httpx.get(server.url + paths[0]).status_code == 401
    assert server.get(paths[0]).status_code == 200
    tap.delete(replies[0])
    assert server.get(paths[0]).status_code == 404
    with pytest.raises(TransportError, match="404"):
        tap.delete(replies[0])
    deadline = time.monotonic() + 10 * TTL_S
    while server.get(paths[1]).status_code == 200:
        assert time.monotonic() < deadline
    with pytest.raises(TransportError, match="404: there are no rows"):
        tap.samples(replies[1])
    with pytest.raises(CaptureError, match="this reply has no rows"):
        tap.samples(client.completions.create(model="tiny", prompt="hello", **GREEDY))


def test_other_formats_have_the_same_rows(server: Server, client: Any, tap: HttpTap, tmp_path: Path) -> None:
    """As safetensors, and one layer as numpy's."""
    from safetensors.torch import load

    reply = client.completions.create(model="tiny", prompt="hello", extra_body=tap.extra_body(SPEC), **GREEDY)
    (sample,) = tap.samples(reply)
    path = reply.kv_transfer_params["vllm_tap"]["href"].removeprefix("/v1")
    tensors = load(server.get(path, params={"format": "safetensors"}).content)
    assert torch.equal(tensors["0.0.hidden_states.2"], sample.hidden_states[2])
    assert torch.equal(tensors["0.0.positions"], sample.positions)
    (tmp_path / "rows.npy").write_bytes(
        server.get(path, params={"format": "npy", "stream": "hidden_states", "layer": 1}).content
    )
    assert np.array_equal(np.load(tmp_path / "rows.npy"), sample.hidden_states[1].numpy())
    assert server.get(path, params={"format": "npy"}).status_code == 404
    assert server.get(path, params={"format": "parquet"}).status_code == 400


def test_limits_refuse_or_end_a_capture_and_leave_the_tokens(client: Any, tap: HttpTap) -> None:
    """More bytes than the server keeps: the reply says so. An id in use: 409. Nothing stays in the way."""
    given = {"model": "tiny", "prompt": "x" * 200, **GREEDY, "n": 12, "temperature": 1.0}
    reply = client.completions.create(**given, extra_body=tap.extra_body(SPEC))
    assert len(reply.choices) == 12
    with pytest.raises(CaptureError, match="bytes of rows"):
        tap.samples(reply)
    once = {"extra_body": tap.extra_body(Spec(hidden_states=[0])), "extra_headers": {"X-Request-Id": "twice"}}
    client.completions.create(model="tiny", prompt="hello", **GREEDY, **once)
    with pytest.raises(openai.ConflictError):
        client.completions.create(model="tiny", prompt="hello", **GREEDY, **once)
    tap.delete("twice")
    client.completions.create(model="tiny", prompt="hello", **GREEDY, **once)


def test_a_client_that_leaves_disturbs_nobody(
    server: Server, tap: HttpTap, references: Callable[[str], References]
) -> None:
    """Some of many requests go in the middle; the others have all their rows, and the counters rise."""

    def rows() -> float:
        lines = httpx.get(server.url.replace("/v1", "/metrics")).text.splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith("vllm_tap_rows_total"))

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        extra = {**tap.extra_body(Spec(hidden_states="all", embeddings=True)), "ignore_eos": True}

        async def leaves(name: str) -> None:
            stream = await client.completions.create(
                model="tiny", prompt=name, stream=True, max_tokens=240, extra_body=extra,
                extra_headers={"X-Request-Id": name},
            )  # fmt: skip
            async for _ in stream:
                break
            await stream.close()
            try:
                (sample,) = await tap.samples_async(name)
                outcome = "all rows" if len(sample.hidden_states[0]) >= 240 else "some rows"
            except CaptureError as error:
                outcome = str(error)
            # A busy machine may have computed all of its tokens before it sees that the client has gone.
            assert "aborted" in outcome or outcome == "all rows"

        async def stays(name: str) -> Sample:
            reply = await client.completions.create(model="tiny", prompt=name, **GREEDY, extra_body=extra)
            (sample,) = await tap.samples_async(reply)
            return sample

        *_, left = await asyncio.gather(
            *(leaves(f"leaves-{i}") for i in range(4)), asyncio.gather(*(stays(f"stays {i}") for i in range(8)))
        )
        for sample in left:
            compare(sample, references)

    before = rows()
    asyncio.run(run())
    assert rows() > before
