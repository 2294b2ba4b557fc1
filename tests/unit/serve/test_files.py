"""Files of hidden states: what is in them, their names, their end. No server runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vllm_tap.client.owned import OwnedRows
from vllm_tap.client.result import Capture
from vllm_tap.client.sequences import Sequences
from vllm_tap.errors import BudgetError, SpecError
from vllm_tap.serve import settings
from vllm_tap.serve.files import FileReply
from vllm_tap.serve.settings import KEY
from vllm_tap.spec import Spec
from vllm_tap.vllm.asynchronous import Tokens

PROMPT = [5, 6, 7, 8]


def captured(first: int, last: int, tokens: Tokens) -> Capture:
    """Return rows of some positions of a prompt: layer 1 has them plus 1, layer 3 plus 3."""
    sequences = Sequences([tokens], "prompt")
    sequences.wanted = sequences.wanted[first:last]
    sequences.wanted_starts = sequences.wanted_starts.__class__((2,), sequences.wanted_starts.dtype)
    sequences.wanted_starts[:] = 0, len(sequences.wanted)
    rows = {("hidden_states", layer): torch.arange(first, last)[:, None].repeat(1, 3) * 1.0 + layer for layer in (1, 3)}
    states = {place: tensor.to(torch.bfloat16) for place, tensor in rows.items()}
    spec = Spec(hidden_states=[1, 3], positions="prompt")
    return Capture(
        spec, [tokens], sequences, [OwnedRows(states)], {"hidden_states": "x"}, {}, ["hidden_states"], 4, True
    )


def finished() -> Tokens:
    """Return the tokens of a prompt that has ended."""
    tokens = Tokens(is_delta=True)
    one = SimpleNamespace(index=0, token_ids=[9])
    tokens.add(SimpleNamespace(request_id="r", finished=True, prompt_token_ids=PROMPT, outputs=[one]))
    return tokens


async def fill(reply: FileReply) -> int:
    """Put a prompt into a reply, in two parts."""
    prompt, tokens = reply.expect(), finished()
    await reply.add(prompt, captured(0, 3, tokens), False)
    assert await reply.add(prompt, captured(3, 4, tokens), True) == (1, 12)
    assert reply.end(prompt, tokens) == ""
    return prompt


def test_a_file_has_the_rows_of_a_prompt(tmp_path: Path) -> None:
    """The path of the first is where vLLM's connector has it; those of all are ours."""

    async def run() -> None:
        reply = FileReply(tmp_path, ttl_s=1000)
        await fill(reply)
        await fill(reply)
        paths = [file["path"] for file in reply.fields["vllm_tap"]["files"]]
        assert reply.fields["hidden_states_path"] == paths[0]
        assert sorted(map(str, tmp_path.iterdir())) == sorted(paths)
        for path in paths:
            tensors = load_file(path)
            assert tensors["token_ids"].dtype == torch.int64
            assert tensors["token_ids"].tolist() == PROMPT
            assert tensors["hidden_states"].dtype == torch.bfloat16
            assert tensors["hidden_states"][:, :, 0].tolist() == [[1, 3], [2, 4], [3, 5], [4, 6]]

    asyncio.run(run())


def test_a_file_that_nobody_takes_goes_with_its_time(tmp_path: Path) -> None:
    """One that its reader has deleted is nobody's trouble."""

    async def run() -> None:
        reply = FileReply(tmp_path, ttl_s=0.01)
        await fill(reply)
        await fill(reply)
        Path(reply.fields["hidden_states_path"]).unlink(missing_ok=True)
        while list(tmp_path.iterdir()):
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_folder_that_takes_nothing_is_told(tmp_path: Path) -> None:
    """In the reply, which has no path; nothing is left."""

    async def run() -> None:
        reply, tokens = FileReply(tmp_path / "gone", ttl_s=1000), finished()
        prompt = reply.expect()
        with pytest.raises(BudgetError, match="does not take"):
            await reply.add(prompt, captured(0, 4, tokens), True)
        reply.end(prompt, tokens, "it is full")
        assert reply.fields == {"vllm_tap": {"files": [], "error": "it is full"}}

    asyncio.run(run())


@pytest.mark.parametrize(
    "spec",
    [
        None,
        {"router_logits": "all"},
        {"hidden_states": [1], "final_hidden_states": True},
        {"hidden_states": [1], "positions": "last"},
        {"hidden_states": [1], "reduce": "mean"},
    ],
)
def test_a_spec_that_does_not_fit_into_files_is_refused(tmp_path: Path, spec: Any) -> None:
    """When the server starts."""
    with pytest.raises(SpecError, match="hidden_states_folder takes a spec"):
        settings.read({KEY: {"spec": spec, "hidden_states_folder": str(tmp_path)}})
    fits = {"hidden_states": [1], "embeddings": True, "positions": "prompt"}
    given = settings.read({KEY: {"spec": fits, "hidden_states_folder": str(tmp_path / "new")}})
    assert Path(given.hidden_states_folder).is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(SpecError, match="hidden_states_folder: "):
        settings.read({KEY: {"spec": fits, "hidden_states_folder": str(tmp_path / "file")}})


def test_the_file_of_a_prompt_that_fails_goes_and_those_of_others_stay(tmp_path: Path) -> None:
    """Whichever ends first, and though the file was there before."""

    async def run() -> None:
        reply, tokens = FileReply(tmp_path, 60.0), finished()
        prompts = [reply.expect() for _ in range(3)]
        for prompt in prompts:
            await reply.add(prompt, captured(0, 4, tokens), True)
        assert reply.end(2, tokens) == ""
        assert reply.end(0, tokens) == ""
        assert reply.end(1, tokens, "it broke") == "it broke"
        told = reply.fields["vllm_tap"]
        assert [file["prompt"] for file in told["files"]] == [0, 2]
        assert sorted(file["path"] for file in told["files"]) == sorted(map(str, tmp_path.iterdir()))
        assert reply.fields["hidden_states_path"] == told["files"][0]["path"]
        assert told["error"] == "it broke"

    asyncio.run(run())
