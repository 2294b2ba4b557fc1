"""Rows over HTTP from vLLM's server, through the unmodified openai client: one server for all tests.

The server has two API processes; a tiny Llama with a tokenizer of bytes runs in it on the CPU.
VLLM_TAP_TEST_MATRIX=full adds a server of two data parallel engines.
"""

from __future__ import annotations

import asyncio
import re
import runpy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import device
from engine.engines import FULL_MATRIX, TOLERANCE, Recorded, References, error, expected_rows
from engine.engines import compare as compare_samples
from servers import KEY, Server
from vllm_tap import DatasetWriter, HttpTap, Sample, Spec, open_dataset
from vllm_tap.errors import CaptureError, TransportError
from vllm_tap.frame import body
from vllm_tap.store.verify import verify

httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(device.ON_CUDA, reason="the server runs on the CPU"),
]

TTL_S = 20.0  # time enough to read a result, on a busy machine
SPEC = Spec(hidden_states="all", embeddings=True)
GREEDY: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
LIKELIEST = {"top_k": 1}
"""Greedy sampling of several completions, which vLLM refuses at temperature 0."""

SETTINGS = {"ttl_s": TTL_S, "max_bytes": 4 << 20, "max_results": 32, "max_specs": 4}


@pytest.fixture(scope="module", params=[1, 2] if FULL_MATRIX else [1])
def num_engines(request: pytest.FixtureRequest) -> int:
    """Number of engines of the server."""
    return int(request.param)


@pytest.fixture(scope="module")
def server(
    tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, num_engines: int
) -> Iterator[Server]:
    """A server."""
    log = tmp_path_factory.mktemp("serve") / "log"
    server = Server(tiny_model("llama"), log, SETTINGS, enable_scale_out=True, data_parallel_size=num_engines)
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


def test_samples_of_replies_make_a_dataset(
    client: Any, tap: HttpTap, references: Callable[[str], References], tmp_path: Path
) -> None:
    """Of many requests, with what each was about; it knows the server's model."""
    with DatasetWriter(tmp_path) as writer:
        for prompt in ("hello world", "one more", "and a third"):
            given = {"model": "tiny", "prompt": prompt, "max_tokens": 6, "temperature": 1.0, "n": 2}
            reply = client.completions.create(**given, extra_body=tap.extra_body(SPEC))
            writer.add(tap.samples(reply, delete=True), [{"text": choice.text} for choice in reply.choices])
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 6
    assert (dataset.spec, dataset.facts.model["dtype"]) == (SPEC, "float32")
    assert Path(dataset.facts.model["name"]).is_dir()
    assert all(sample.metadata["text"] for sample in dataset)
    compare_samples(Recorded(dataset), references("llama"))
    assert verify(dataset.path).problems == []
    late = Spec(hidden_states="all", positions=[30], missing="skip")
    with DatasetWriter(tmp_path / "late") as writer:
        for prompt in ("short", "a prompt of more than thirty tokens, each of a byte"):
            reply = client.completions.create(model="tiny", prompt=prompt, **GREEDY, extra_body=tap.extra_body(late))
            writer.add(tap.samples(reply))
    assert [len(sample) for sample in open_dataset(tmp_path / "late")] == [0, 1]


def test_rows_come_while_tokens_stream(server: Server, tap: HttpTap, references: Callable[[str], References]) -> None:
    """To whoever chose the id of the request, or sees that of its reply; the whole is there afterwards."""

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        blocks: list[Any] = []

        async def read(chosen: str) -> None:
            async for block in tap.stream_rows_async(chosen):
                blocks.append(block)

        async def streamed(chosen: str) -> tuple[str, str, int]:
            """Return the text, the name of the reply, and how many blocks came before the last token."""
            blocks.clear()
            reading = asyncio.create_task(read(chosen))
            stream = await client.completions.create(
                model="tiny", prompt="stream this", stream=True, **{**GREEDY, "max_tokens": 200},
                extra_body={**tap.extra_body(SPEC), "ignore_eos": True}, extra_headers={"X-Request-Id": chosen},
            )  # fmt: skip
            text, name, num_before = "", "", 0
            async for chunk in stream:
                text, name = text + chunk.choices[0].text, chunk.id
                if chunk.choices[0].finish_reason is None:
                    num_before = len(blocks)
            await reading
            return text, name, num_before

        for number in range(5):  # this process may get all of it at once, where it waits for a core itself
            text, name, num_before = await streamed(f"chosen-{number}")
            if num_before:
                break
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


def test_both_clients_stream_and_chat(
    server: Server, client: Any, tap: HttpTap, references: Callable[[str], References]
) -> None:
    """With and without `stream`, in either API, with two completions: the same tokens, and rows of each choice."""
    extra = {**tap.extra_body(SPEC), **LIKELIEST}
    twice = {"model": "tiny", "n": 2, **GREEDY, "temperature": 1.0}
    texts = {"prompt": ["hello", "a b c"], **twice}
    talk = {"messages": [{"role": "user", "content": "hello"}], **twice}

    def check(samples: list[Sample], num: int) -> None:
        assert len(samples) == num
        for sample in samples:
            compare(sample, references)

    def joined(chunks: list[Any]) -> dict[int, str]:
        found: dict[int, str] = {}
        for choice in (choice for chunk in chunks for choice in chunk.choices):
            text = choice.delta.content if hasattr(choice, "delta") else choice.text
            found[choice.index] = found.get(choice.index, "") + (text or "")
        return found

    async def run() -> None:
        other = openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0)
        completions = client.completions, other.completions, texts, 4
        chat = client.chat.completions, other.chat.completions, talk, 2
        for sync, unsync, given, num in (completions, chat):
            plain = sync.create(**given, extra_body=LIKELIEST)
            expected = {one.index: one.message.content if num == 2 else one.text for one in plain.choices}
            check(await tap.samples_async(await unsync.create(**given, extra_body=extra)), num)
            chunks = list(sync.create(**given, stream=True, extra_body=extra))
            assert joined(chunks) == expected
            check(tap.samples(chunks[0].id), num)
            chunks = [chunk async for chunk in await unsync.create(**given, stream=True, extra_body=extra)]
            assert joined(chunks) == expected
            check(await tap.samples_async(chunks[0].id), num)

    asyncio.run(run())


def test_other_apis_have_rows(
    server: Server, client: Any, tap: HttpTap, references: Callable[[str], References]
) -> None:
    """Responses, Anthropic's messages, and tokens in, tokens out."""
    extra = tap.extra_body(SPEC)
    given = {"model": "tiny", "input": "hello", "max_output_tokens": 6, "temperature": 0.0}
    plain, reply = client.responses.create(**given), client.responses.create(**given, extra_body=extra)
    assert reply.output_text == plain.output_text
    compare(tap.samples(reply)[0], references)
    compare(tap.samples(reply.id)[0], references)
    chunks = list(client.responses.create(**given, stream=True, extra_body=extra))
    compare(tap.samples(chunks[0].response.id)[0], references)

    message = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, **extra}
    replied = server.post("/v1/messages", message)
    assert replied.status_code == 200, replied.text
    compare(tap.samples(replied.json())[0], references)
    params = {**GREEDY, "extra_args": extra["vllm_xargs"]}
    given = {"model": "tiny", "token_ids": [1, 2, 3], "sampling_params": params}
    replied = server.post("/inference/v1/generate", given)
    assert replied.status_code == 200, replied.text
    compare(tap.samples(replied.json())[0], references)


def test_counters_add_up(server: Server, client: Any, tap: HttpTap) -> None:
    """What began is completed, failed or aborted; rows and bytes are those that are read."""
    before = server.metrics()

    def change() -> dict[str, float]:
        return {name: value - before.get(name, 0.0) for name, value in server.metrics().items()}

    extra = tap.extra_body(SPEC)
    twice = {**GREEDY, "n": 2, "temperature": 1.0}
    reply = client.completions.create(model="tiny", prompt=["hello", "b"], **twice, extra_body=extra)
    sent = server.get(reply.kv_transfer_params["vllm_tap"]["href"].removeprefix("/v1")).content
    frames = [frame for frame in body.frames(sent) if frame.head["kind"] == "rows"]
    found = change()
    assert found["rows"] == sum(frame.head["rows"] for frame in frames)
    heads = [{name: value for name, value in frame.head.items() if name != "kind"} for frame in frames]
    sent_again = [body.encode("rows", frame.data, **head) for frame, head in zip(frames, heads, strict=True)]
    assert found["bytes"] == sum(map(len, sent_again))
    tap.delete(reply)
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", extra_body={"vllm_xargs": {"vllm_tap": "{"}}, **GREEDY)
    client.completions.create(model="tiny", prompt="x" * 200, n=12, temperature=1.0, max_tokens=6, extra_body=extra)
    stream = client.completions.create(
        model="tiny", prompt="x", stream=True, max_tokens=240, extra_body={**extra, "ignore_eos": True},
        extra_headers={"X-Request-Id": "counted"},
    )  # fmt: skip
    next(iter(stream))
    stream.close()
    outcome = _outcome(tap, "counted")
    aborts = int("aborted" in outcome)
    # A busy machine may have computed all of its tokens before it sees that the client has gone.
    assert aborts or outcome == "240 tokens"
    while (found := change())["aborts"] < aborts or found["completed"] < 3 - aborts:
        time.sleep(0.05)
    assert [found[name] for name in ("requests", "completed", "failures", "aborts")] == [4, 3 - aborts, 1, aborts]
    assert [found[name] for name in ("reads", "deletes", "refusals")] == [2, 1, 1]


def _outcome(tap: HttpTap, name: str) -> str:
    """Return what became of a captured request: how many tokens, or what ended its rows."""
    try:
        (sample,) = tap.samples(name)
    except CaptureError as error:
        return str(error)
    return f"{len(sample.output.outputs[0].token_ids)} tokens"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{", "as JSON text"),
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

    before = server.metrics()["rows"]
    asyncio.run(run())
    assert server.metrics()["rows"] > before


def test_programs_of_documents_run(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's lines, of which the second says where the server is, and examples/serve.py."""
    root = Path(__file__).resolve().parents[2]
    (lines,) = re.findall(r"```python\n(import openai.*?)```", (root / "README.md").read_text(), re.DOTALL)
    names = f'url, key, model = "{server.url}", "{KEY}", "tiny"'
    exec(re.sub("(?m)^url, key, model = .*$", names, lines), {})
    told = capsys.readouterr().out
    assert told.count("torch.Size") == 2
    runpy.run_path(str(root / "examples" / "serve.py"))["main"]("tiny", server.url, KEY)
    told = capsys.readouterr().out
    assert told.count("torch.Size") == 4
    assert "\n[0, 1, 2" in told
