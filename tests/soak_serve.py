"""Many requests at a time to a server of a tiny model: half are captured, with different Specs, and some are aborted.

Every row is compared with a Hugging Face forward pass, run once for each sequence. Exit status 1 if a row was wrong or
missing, if the counters do not add up, or if the memory of one of the server's processes grew.

python tests/soak_serve.py --seconds 200 --seed 0
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

import surroundings  # noqa: F401
from engine.engines import TOLERANCE, References, error, expected_rows
from memory import held
from models import ensure_model
from servers import KEY, Server
from vllm_tap import HttpTap, Sample, Spec
from vllm_tap.errors import CaptureError, TransportError

SPECS = [
    Spec(hidden_states="all"),
    Spec(hidden_states=[0, -1], positions="last"),
    Spec(hidden_states=[2], positions="generated"),
    Spec(embeddings=True, positions="prompt"),
    Spec(hidden_states=[1], positions=[0, -1]),
    Spec(hidden_states=[3], reduce="mean"),
]
NUM_TOKENS = (2, 6, 24)
NUM_PROMPTS = 48
KINDS = ("plain", "plain", "captured", "captured streaming")
ALTERED = 0.01
"""Share of samples of which a row is altered after it was found right, to see that this is found too."""

GROWTH = 1.05
"""What the last third of the samples of memory may be of the second one, after a third of warming up."""


class Soak:
    """Requests, and what came of them."""

    def __init__(self, server: Server, references: References, seed: int, kinds: Sequence[str]) -> None:
        self._server, self._references, self._draw, self._kinds = server, references, random.Random(seed), kinds
        self._tap = HttpTap(server.url, api_key=KEY)
        # A forward pass takes a while, in which replies are to be read.
        self._beside = ThreadPoolExecutor(1)
        rng = np.random.default_rng(seed)
        lengths = rng.integers(2, 120, NUM_PROMPTS)
        self._prompts = [rng.integers(0, 256, length).tolist() for length in lengths]
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[str] = []
        self.texts: dict[tuple[int, int], set[str]] = collections.defaultdict(set)
        self.memory: dict[str, list[int]] = collections.defaultdict(list)

    async def run(self, seconds: float, at_a_time: int) -> None:
        """Send requests for some time."""
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=2 * at_a_time, keepalive_expiry=600)
        headers = {"Authorization": f"Bearer {KEY}"}
        async with httpx.AsyncClient(timeout=300, trust_env=False, limits=limits, headers=headers) as client:

            async def send() -> None:
                while time.monotonic() < end and len(self.faults) < 20:
                    try:
                        await self._send(client)
                    except Exception as failed:
                        self.faults.append(repr(failed))

            async def watch() -> None:
                while time.monotonic() < end:
                    self._note_memory()
                    await asyncio.sleep(1)

            await asyncio.gather(watch(), *(send() for _ in range(at_a_time)))

    def _note_memory(self) -> None:
        """Note the bytes of each of the server's processes that are no cache of files."""
        process = psutil.Process(self._server.process.pid)
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error, OSError):  # it has ended
                self.memory[f"{one.name()} {one.pid}"].append(held(one.pid))

    async def _send(self, client: httpx.AsyncClient) -> None:
        draw = self._draw
        number, num_tokens, spec = draw.randrange(NUM_PROMPTS), draw.choice(NUM_TOKENS), draw.choice(SPECS)
        kind = draw.choice(self._kinds)
        leaves = draw.random() < 0.1
        given: dict[str, Any] = {
            "model": "tiny", "prompt": self._prompts[number], "max_tokens": num_tokens, "temperature": 0.0,
            "ignore_eos": True, "stream": leaves or kind == "captured streaming",
        }  # fmt: skip
        name = f"{draw.getrandbits(128):x}"
        if kind != "plain":
            given.update(HttpTap.extra_body(spec))
        url = f"{self._server.url}/completions"
        async with client.stream("POST", url, json=given, headers={"X-Request-Id": name}) as reply:
            if reply.status_code != 200:
                self.faults.append(f"{reply.status_code}: {(await reply.aread())[:300]!r}")
                return
            if leaves:
                async for _ in reply.aiter_bytes():
                    break
                self.counts[f"{kind}, aborted"] += 1
                return
            body = await reply.aread()
        self.counts[kind] += 1
        if kind == "captured streaming":
            await self._check(name, spec, number)
        else:
            told = httpx.Response(200, content=body).json()
            self.texts[number, num_tokens].add(told["choices"][0]["text"])
            if kind == "captured":
                await self._check(told["kv_transfer_params"]["vllm_tap"]["id"], spec, number)

    async def _check(self, name: str, spec: Spec, number: int) -> None:
        """Compare all rows of a reply; let go of them in the server."""
        try:
            at_once = self._draw.random() < 0.5
            (sample,) = await self._tap.samples_async(name, delete=at_once)
            if not at_once:
                await asyncio.to_thread(self._tap.delete, name)
        except (CaptureError, TransportError) as failed:
            self.faults.append(f"{spec}: {failed}")
            return
        self.counts["rows"] += len(sample)
        if sample.output.prompt_token_ids != self._prompts[number]:
            self.faults.append(f"{spec}: rows of another prompt")
        self.faults += await asyncio.get_running_loop().run_in_executor(self._beside, self._wrong, sample, spec)
        if self._draw.random() < ALTERED:
            self._alter(sample, spec)

    def _alter(self, sample: Sample, spec: Spec) -> None:
        """Alter a row, and look whether that is found."""
        self.counts["altered"] += 1
        _, _, rows = _planes(sample, spec)[-1]
        rows[-1] *= -1
        if not self._wrong(sample, spec):
            self.faults.append(f"{spec}: an altered row was taken for a right one")

    def _wrong(self, sample: Sample, spec: Spec) -> list[str]:
        """Return what is wrong with the rows of a sample."""
        tokens = sample.output.prompt_token_ids + sample.output.outputs[0].token_ids[:-1]
        whole = self._references.of(tokens)
        prompt = len(sample.output.prompt_token_ids)
        expected_positions = {
            "all": range(len(tokens)), "last": [prompt - 1], "generated": range(prompt, len(tokens)),
            "prompt": range(prompt), (-1, 0): [0, prompt - 1],
        }[spec.positions]  # type: ignore[index]  # fmt: skip
        positions = list(expected_positions)
        faults = []
        if not spec.reduce and sample.positions.tolist() != positions:
            faults.append(f"{spec}: positions {sample.positions.tolist()} for {positions}")
        for stream, layer, rows in _planes(sample, spec):
            expected = expected_rows(whole, stream, layer)
            scale = expected.square().mean().sqrt()
            chosen = expected.mean(0, keepdim=True) if spec.reduce else expected[positions]
            if rows.shape != chosen.shape or not error(rows, chosen, scale) < TOLERANCE:
                faults.append(f"{spec}: layer {layer} is wrong")
        return faults


def _planes(sample: Sample, spec: Spec) -> list[tuple[str, int, Any]]:
    """Return the rows of a sample, with their streams and layers."""
    if spec.hidden_states is None:
        return [("embeddings", 0, sample.embeddings)]
    return [("hidden_states", layer, rows) for layer, rows in sample.hidden_states.items()]


def growth(memory: list[int]) -> tuple[float, float]:
    """Return medians of the second third and of the last one, in MiB."""
    third = len(memory) // 3
    return statistics.median(memory[third : 2 * third]) / 2**20, statistics.median(memory[2 * third :]) / 2**20


def main() -> int:
    """Run, and say what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-a-time", type=int, default=256)
    parser.add_argument("--plain", action="store_true", help="capture nothing, to see how a server grows by itself")
    parser.add_argument("--engines", type=int, default=1, help="data parallel engines of the server")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the engine has the others
    with tempfile.TemporaryDirectory() as folder:
        model = ensure_model(Path(folder), "llama", "float32")
        arguments = {"max_num_seqs": 64, "max_num_batched_tokens": 512, "data_parallel_size": options.engines}
        server = Server(model, Path(folder) / "log", {"ttl_s": 60}, **arguments)
        soak = Soak(server, References(model), options.seed, KINDS[:1] if options.plain else KINDS)
        try:
            asyncio.run(soak.run(options.seconds, options.at_a_time))
            metrics = server.metrics()
            deadline = time.monotonic() + 60
            while metrics["requests"] > metrics["completed"] + metrics["failures"] + metrics["aborts"]:
                metrics = server.metrics()
                if time.monotonic() > deadline:
                    soak.faults.append("requests are neither completed nor failed nor aborted")
                    break
        finally:
            server.close()
    counts = soak.counts
    captured = counts["captured"] + counts["captured streaming"]
    most = captured + counts["captured, aborted"] + counts["captured streaming, aborted"]
    if metrics["failures"] or not captured <= metrics["completed"] <= metrics["requests"] <= most:
        soak.faults.append("the counters do not add up")
    for name, memory in soak.memory.items():
        if len(memory) < 3:  # it ended at once
            continue
        before, after = growth(memory)
        print(f"memory of {name}: {before:.0f} MiB, then {after:.0f} MiB")
        if after > GROWTH * before:
            soak.faults.append(f"{name} grows")
    print(*soak.faults, sep="\n")
    print(f"{dict(counts)}; counters {metrics}")
    print(f"{sum(len(texts) > 1 for texts in soak.texts.values())} of {len(soak.texts)} prompts got different tokens")
    print(f"{len(soak.faults)} faults")
    return int(bool(soak.faults))


if __name__ == "__main__":
    sys.exit(main())
