"""Rows of requests that do not ask: a server with a default Spec, which writes files and puts small results inline.

A server for each of the two forms of its replies would cost a start; so the one here has files, and requests that say
what they want have theirs inline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import device
from engine.engines import TOLERANCE, References, error, expected_rows
from servers import KEY, Server
from vllm_tap import HttpTap, Spec
from vllm_tap.errors import CaptureError

openai = pytest.importorskip("openai")

pytestmark = [
    pytest.mark.engine,
    pytest.mark.timeout(900),
    pytest.mark.skipif(device.ON_CUDA, reason="the server runs on the CPU"),
]

LAYERS = [1, 3]
INLINE_BYTES = 16384
BUDGET_BYTES = 2 << 20
GREEDY: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "temperature": 0.0}
TWICE: dict[str, Any] = {**GREEDY, "n": 2, "temperature": 1.0}


class Files:
    """A server that answers with files, and their folder."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.folder = folder / "states"
        settings = {
            "spec": {"hidden_states": [1, -1], "embeddings": True, "positions": "prompt"},
            "hidden_states_folder": str(self.folder),
            "inline_bytes": INLINE_BYTES,
            "budget_bytes": BUDGET_BYTES,
        }
        self.server = Server(model, folder / "log", settings, api_server_count=1)
        self.client = openai.OpenAI(base_url=self.server.url, api_key=KEY, max_retries=0)
        self.tap = HttpTap(self.server.url, api_key=KEY)


@pytest.fixture(scope="module")
def files(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    """Such a server."""
    files = Files(tiny_model("llama"), tmp_path_factory.mktemp("defaults"))
    yield files
    files.server.close()


def check(path: str, token_ids: list[int], references: Callable[[str], References]) -> None:
    """Compare a file with Hugging Face: embeddings, then the layers, of the prompt."""
    tensors = load_file(path)
    assert tensors["token_ids"].tolist() == token_ids
    assert tensors["hidden_states"].shape[:2] == (len(token_ids), 1 + len(LAYERS))
    whole = references("llama").of(token_ids)
    for number, place in enumerate([("embeddings", 0), *(("hidden_states", layer) for layer in LAYERS)]):
        expected = expected_rows(whole, *place)
        assert error(tensors["hidden_states"][:, number], expected, expected.square().mean().sqrt()) < TOLERANCE


def test_requests_that_do_not_ask_have_a_file(files: Files, references: Callable[[str], References]) -> None:
    """Of each prompt; the tokens are those of a request that is captured otherwise."""
    prompts = [[1, 2, 3, 4, 5], list(range(100, 190))]
    given = {**GREEDY, "extra_body": {"return_token_ids": True}}
    for prompt in prompts:
        reply = files.client.completions.create(prompt=prompt, **given)
        assert Path(reply.kv_transfer_params["hidden_states_path"]).parent == files.folder
        check(reply.kv_transfer_params["hidden_states_path"], prompt, references)
        other = files.client.completions.create(
            prompt=prompt, **GREEDY, extra_body=files.tap.extra_body(Spec(hidden_states=[0], positions="last"))
        )
        assert "hidden_states_path" not in other.kv_transfer_params
        assert other.choices[0].text == reply.choices[0].text
        with pytest.raises(CaptureError, match="in files"):
            files.tap.samples(reply)
    reply = files.client.completions.create(prompt=prompts, **TWICE)
    for prompt, file in zip(prompts, reply.kv_transfer_params["vllm_tap"]["files"], strict=True):
        check(file["path"], prompt, references)
    messages: Any = [{"role": "user", "content": "hello"}]
    reply = files.client.chat.completions.create(messages=messages, **given)
    check(reply.kv_transfer_params["hidden_states_path"], reply.prompt_token_ids, references)


def test_beams_are_not_captured(files: Files) -> None:
    """Not by default: vLLM makes requests of its own for them."""
    before = files.server.metrics()["requests"]
    reply = files.client.completions.create(
        model="tiny", prompt="beams", n=2, max_tokens=3, temperature=0.0, extra_body={"use_beam_search": True}
    )
    assert len(reply.choices) == 2
    assert files.server.metrics()["requests"] == before


def test_small_results_are_in_the_reply(files: Files, references: Callable[[str], References]) -> None:
    """And not kept; larger ones wait to be read. Streams of tokens cannot carry them."""
    spec = Spec(hidden_states=LAYERS, positions="last")
    reply = files.client.completions.create(prompt=["hello", "b"], **TWICE, extra_body=files.tap.extra_body(spec))
    handle = reply.kv_transfer_params["vllm_tap"]
    assert "href" not in handle
    assert files.server.get(f"/tap/rows/{handle['id']}").status_code == 404
    nobody = HttpTap("http://127.0.0.1:9")
    samples = [*nobody.samples(reply), *asyncio.run(nobody.samples_async(reply))]
    assert [(sample.index, sample.completion) for sample in samples] == [(0, 0), (0, 1), (1, 0), (1, 1)] * 2
    for sample in samples:
        whole = references("llama").of(sample.output.prompt_token_ids)
        for layer in LAYERS:
            expected = expected_rows(whole, "hidden_states", layer)
            assert error(sample.hidden_states[layer], expected[-1:], expected.square().mean().sqrt()) < TOLERANCE
    nobody.delete(reply)
    large = files.client.completions.create(
        prompt="x" * 100, **GREEDY, extra_body=files.tap.extra_body(Spec(hidden_states=LAYERS))
    )
    assert "data" not in large.kv_transfer_params["vllm_tap"]
    assert len(files.tap.samples(large)[0]) == 103
    stream = files.client.completions.create(
        prompt="hello", stream=True, **GREEDY, extra_body=files.tap.extra_body(spec)
    )
    (sample,) = files.tap.samples([chunk.id for chunk in stream].pop())
    assert torch.equal(sample.hidden_states[1], samples[0].hidden_states[1])


def test_requests_wait_for_room_in_the_workers(files: Files, references: Callable[[str], References]) -> None:
    """Rows of all that run at once are more than the budget: none is lost, and no capture ends."""
    spec = Spec(hidden_states="all", embeddings=True)
    prompts = [[number, *range(200)] for number in range(48)]
    before = files.server.metrics()
    reply = files.client.completions.create(prompt=prompts, **GREEDY, extra_body=files.tap.extra_body(spec))
    samples = files.tap.samples(reply, delete=True)
    assert [sample.output.prompt_token_ids for sample in samples] == prompts
    assert sum(tensor.nbytes for sample in samples for tensor in sample.hidden_states.values()) > 4 * BUDGET_BYTES
    for sample in samples[::8]:
        whole = references("llama").of([*sample.output.prompt_token_ids, *sample.output.outputs[0].token_ids])
        for layer in LAYERS:
            expected = expected_rows(whole, "hidden_states", layer)[: len(sample)]
            assert error(sample.hidden_states[layer], expected, expected.square().mean().sqrt()) < TOLERANCE
    stalls, seconds = (files.server.metrics()[name] - before[name] for name in ("stalls", "stalled_seconds"))
    assert 0 < stalls < len(prompts)
    assert seconds > 0
