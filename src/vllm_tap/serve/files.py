"""Files of hidden states, in the form of vLLM's own connector, for clients that read those. In each API process.

A file has `hidden_states` [T, A, D] and `token_ids` int64 [T] of a prompt: embeddings first if they are captured, then
the layers, ascending. It lies in the folder under its name once it is whole.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from pathlib import Path
from typing import Any, Final

import torch

from vllm_tap.client.result import Capture
from vllm_tap.errors import BudgetError
from vllm_tap.labels import KEY
from vllm_tap.store.dtypes import bytes_of
from vllm_tap.store.shard import Array, header
from vllm_tap.vllm.asynchronous import Tokens

FIELD: Final = "hidden_states_path"
"""Entry of `kv_transfer_params`, as vLLM's connector names it."""

STREAMS: Final = ("embeddings", "hidden_states")


class FileReply:
    """Writes a file for the first completion of each prompt; the reply has the path of the first prompt's.

    Args:
        folder: Where files lie.
        ttl_s: Seconds after which a file goes that its reader has left.
    """

    has_readers = False
    """Files are read when they are whole."""

    def __init__(self, folder: Path, ttl_s: float) -> None:
        self._folder, self._ttl_s = folder, ttl_s
        self._pieces: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        self._paths: dict[int, Path] = {}  # of prompts that have not ended
        self._failed: set[int] = set()
        self._handle: dict[str, Any] = {"files": []}
        self.fields: dict[str, Any] = {KEY: self._handle}

    def expect(self) -> int:
        """Return the number of one more prompt."""
        self._pieces.append([])
        return len(self._pieces) - 1

    async def add(self, prompt: int, captured: Capture, finished: bool) -> tuple[int, int]:
        """Take rows of a prompt, and write the file with the last ones; return how many, and their bytes.

        Raises:
            BudgetError: The file cannot be written.
        """
        stop = int(captured.sequences.wanted_starts[1])
        rows = [captured.rows(name, layer, 0, stop) for name in STREAMS for layer in captured.layers.get(name, ())]
        states, token_ids = torch.stack(rows, 1), captured.sequences.token_ids[captured.sequences.wanted[:stop]]
        self._pieces[prompt].append((states, torch.from_numpy(token_ids.astype("int64"))))
        if finished:
            await self._write(prompt)
        return stop, states.nbytes

    async def _write(self, prompt: int) -> None:
        pieces, self._pieces[prompt] = self._pieces[prompt], []
        tensors = {
            "hidden_states": torch.cat([states for states, _ in pieces]),
            "token_ids": torch.cat([token_ids for _, token_ids in pieces]),
        }
        path = self._folder / f"rows-{secrets.token_urlsafe(18)}.safetensors"
        try:
            await asyncio.to_thread(write, path, tensors)
        except OSError as error:
            raise BudgetError(f"{path.parent} does not take a file of rows: {error}") from error
        asyncio.get_running_loop().call_later(self._ttl_s, path.unlink, True)
        self._paths[prompt] = path
        if prompt in self._failed:
            self._let_go(prompt)

    def _let_go(self, prompt: int) -> None:
        """Remove the file of a prompt, of which nobody was told."""
        if (path := self._paths.pop(prompt, None)) is not None:
            path.unlink(missing_ok=True)

    def end(self, prompt: int, tokens: Tokens, error: str = "") -> str:
        """Say that a prompt has ended; the first error is in the reply. With one, its file goes."""
        self._pieces[prompt] = []
        if error:
            self._handle.setdefault("error", error)
            self._failed.add(prompt)
            self._let_go(prompt)
            return error
        if (path := self._paths.pop(prompt, None)) is not None:
            self._handle["files"].append({"prompt": prompt, "path": str(path)})
            self._handle["files"].sort(key=lambda file: file["prompt"])
            if not prompt:
                self.fields[FIELD] = str(path)
        return ""

    def close(self) -> None:
        """Nothing waits to be read here."""


def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file, which has its name when it is whole."""
    arrays = {name: Array(str(one.dtype).removeprefix("torch."), tuple(one.shape)) for name, one in tensors.items()}
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as file:
            file.write(header(arrays, {"last": "pre-norm"}))
            for one in tensors.values():
                file.write(bytes_of(one).data)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
