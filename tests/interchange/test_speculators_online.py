"""speculators, unmodified, beside our server: its client and its dataset get states that vLLM's connector would give.

Skips where it is not installed: `make test-interchange-speculators`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openai
import pytest
import torch

import device
from engine.engines import TOLERANCE, error
from interchange.test_speculators import layer_inputs
from readers import reader
from servers import Server

pytestmark = pytest.mark.skipif(device.ON_CUDA, reason="the server runs on the CPU")

THEIR_IDS = [1, 2, 3, 4]
"""Inputs of layers, and the last output, of a model of four layers."""

KEY = "EMPTY"
"""The API key that their dataset sends."""


class Online(NamedTuple):
    """A server whose default Spec is what speculators wants, and the folder that it writes into."""

    server: Server
    model: Path
    folder: Path


@pytest.fixture(scope="module")
def online(tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Online]:
    """Such a server."""
    reader("speculators.data_generation.vllm_client")
    model, folder = tiny_model("llama"), tmp_path_factory.mktemp("online")
    spec = {"hidden_states": [their - 1 for their in THEIR_IDS], "positions": "prompt"}
    settings = {"spec": spec, "hidden_states_folder": str(folder / "states")}
    server = Server(model, folder / "log", settings, api_server_count=1, api_key=KEY)
    yield Online(server, model, folder / "states")
    server.close()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Prompts, of which one takes several steps."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, length).tolist() for length in (3, 150, 40)]


@pytest.fixture(scope="module")
def compare(online: Online) -> Callable[[torch.Tensor, list[int]], None]:
    """A function that compares states [T, A, D] with Hugging Face's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(online.model, dtype=torch.float32)

    def check(states: torch.Tensor, ids: list[int]) -> None:
        seen = layer_inputs(model, torch.tensor([ids]))
        for number, at in enumerate(THEIR_IDS):
            assert error(states[:, number], seen[at], seen[at].square().mean().sqrt()) < TOLERANCE

    return check


def test_its_client_gets_states(
    online: Online, prompts: list[list[int]], compare: Callable[[torch.Tensor, list[int]], None]
) -> None:
    """Completions and chat, also without blocking; its reader and its check take the file, and it deletes it."""
    client = reader("speculators.data_generation.vllm_client")
    check = reader("speculators.data_generation.offline").check_hidden_states
    transfer = reader("hs_connectors.transfer").FileTransfer(online.folder)
    sync = openai.OpenAI(base_url=online.server.url, api_key=KEY, max_retries=0)

    def take(given: tuple[str, dict[str, Any]], ids: list[int]) -> None:
        handle, params = given
        states = transfer.get_generated(params)
        check(states, ids)
        compare(states["hidden_states"], ids)
        transfer.delete(handle)
        assert not Path(handle).exists()

    async def run() -> list[tuple[str, dict[str, Any]]]:
        unsync = openai.AsyncOpenAI(base_url=online.server.url, api_key=KEY, max_retries=0)
        calls = [client.generate_hidden_states_async(unsync, "tiny", {"input_ids": ids}) for ids in prompts]
        return list(await asyncio.gather(*calls))

    for ids in prompts:
        take(client.generate_hidden_states(sync, "tiny", {"input_ids": ids}), ids)
    for ids, given in zip(prompts, asyncio.run(run()), strict=True):
        take(given, ids)
    messages: Any = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
    extra = {"add_generation_prompt": False, "return_token_ids": True}
    reply: Any = sync.chat.completions.create(model="tiny", messages=messages, max_tokens=1, extra_body=extra)
    ids = reply.prompt_token_ids
    take(client.generate_hidden_states(sync, "tiny", {"input_ids": ids, "messages": messages}), ids)


def test_its_dataset_generates_what_it_lacks(
    online: Online, prompts: list[list[int]], compare: Callable[[torch.Tensor, list[int]], None], tmp_path: Path
) -> None:
    """From the first epoch on; it leaves no file of ours."""
    import datasets

    columns = {"input_ids": prompts, "loss_mask": [[1] * len(ids) for ids in prompts]}
    table = datasets.Dataset.from_dict({**columns, "seq_len": list(map(len, prompts))})
    table.with_format("torch").save_to_disk(tmp_path / "data")
    before = set(online.folder.iterdir())
    data = reader("speculators.train.data").ArrowDataset(
        256, tmp_path / "data", vllm_endpoint=online.server.url, hidden_states_dtype=torch.float32, max_retries=0
    )
    for number, ids in enumerate(prompts):
        item = data[number]
        assert item["input_ids"].tolist() == ids
        states = torch.cat([item["hidden_states"], item["verifier_last_hidden_states"]], 1)
        compare(states.view(len(ids), len(THEIR_IDS), -1), ids)
    assert set(online.folder.iterdir()) == before
