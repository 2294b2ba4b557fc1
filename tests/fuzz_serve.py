"""Sends mutated requests for rows to a server of a tiny model, and reads mutated bodies of rows.

Requests: 4xx or right, never 5xx, never a dead server. Bodies: what was sent, or an error of ours.

python tests/fuzz_serve.py --count 2000 --seed 0
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import random
import sys
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent / "support"))

import surroundings  # noqa: F401
from models import ensure_model
from servers import KEY, Server
from vllm_tap import HttpTap, Spec
from vllm_tap.client.bodies import Blocks, Samples
from vllm_tap.errors import TapError
from vllm_tap.frame import body

SPEC = Spec(hidden_states="all", embeddings=True)
SETTINGS = {"ttl_s": 2, "max_bytes": 12 << 20, "max_results": 192, "max_specs": 12, "inline_bytes": 2000}
NUM_CLIENTS = 3
AT_A_TIME = 16
"""Of each client."""


VALUES: list[Any] = [
    None, True, -1, 0, 3, 4, 10**12, 1.5, "", "all", "last", "generated", "prompt", "x" * 1000, [], [0], [-1, 3], [99],
    ["all"], [[0]], {}, {"hidden_states": "all"}, [None], "\x00", "\ud800", float("inf"),
]  # fmt: skip
FIELDS = [*json.loads(SPEC.to_json()), "reduce", "dtype", "nothing", "__class__", ""]
HEADERS = {
    "Range": ["bytes=0-9", "bytes=-3", "bytes=5-3", "bytes=99999999-", "bytes=0-1,3-4", "bytes=" + "9" * 30 + "-", "x"],
    "Accept-Encoding": ["vtr-bytesplit", "vtr-lz4;q=0.5, vtr-zstd", "vtr-;q=", "gzip, zstd, *", "vtr-raw", ";;=,"],
    "Authorization": ["Bearer other", "Bearer", "", "Basic x"],
    "X-Request-Id": ["one", "two", "x" * 300, "cmpl-1-0", "a-beam-0", "%00/../"],
    "If-Range": ["x"],
    "Content-Type": ["text/plain", "application/json; charset=utf-7"],
}
NAMES = ["x", "..", "a" * 5000, "%00", "tap-", "cmpl-1", "\u2603", "a b", "one", "two"]
CODES_OF_FAULTS = range(500, 600)


def mutated(draw: random.Random, data: bytes) -> bytes:
    """Return data of which some bytes are others, missing, or there twice."""
    array = bytearray(data)
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(array) + 1)
        kind = draw.randrange(4)
        if kind == 0:
            array[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del array[at : at + draw.choice([1, 1, 4, 100])]
        elif kind == 2:
            array[at:at] = array[at : at + draw.choice([1, 8, 64])]
        else:
            array[at : at + 1] = draw.choice([b"", b"\x00", b'"', b"{", b"[", b"}", b"]", b"\xff", b"9", b"-"])
    return bytes(array)


def spec_text(draw: random.Random) -> Any:
    """Return what a client may put in the place of a Spec."""
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(VALUES)
    text = json.dumps({draw.choice(FIELDS): draw.choice(VALUES) for _ in range(draw.randrange(1, 4))})
    if kind == 1:
        return text
    if kind == 2:
        return SPEC.to_json()
    return mutated(draw, text.encode()).decode(errors="replace")


class Fuzz:
    """Requests to a server, and what came of them.

    Attributes:
        codes: Numbers of replies by status.
        faults: What must not be.
        bodies: Of rows, as they came.
        read: Numbers of mutated bodies, by what reading them ended with.
    """

    def __init__(self, draw: random.Random, server: Server) -> None:
        self._draw, self._server = draw, server
        self.codes: collections.Counter[int] = collections.Counter()
        self.faults: list[str] = []
        self.bodies: list[bytes] = []
        self.read: collections.Counter[str] = collections.Counter()
        self._tap = HttpTap(server.url, api_key=KEY)

    async def run(self, count: int) -> None:
        """Send so many requests."""
        left = iter(range(count))
        limits = httpx.Limits(max_connections=2 * AT_A_TIME, keepalive_expiry=600)

        async def send(client: httpx.AsyncClient) -> None:
            for number in left:
                await self._send(client, number)

        async with contextlib.AsyncExitStack() as stack:
            clients = [httpx.AsyncClient(timeout=120, trust_env=False, limits=limits) for _ in range(NUM_CLIENTS)]
            for client in clients:
                await stack.enter_async_context(client)
            await asyncio.gather(*(send(client) for client in clients for _ in range(AT_A_TIME)))

    async def _send(self, client: httpx.AsyncClient, number: int) -> None:
        draw = self._draw
        method, path, options = self._rows() if draw.random() < 0.4 else self._completion()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        for name, values in HEADERS.items():
            if draw.random() < 0.1:
                headers[name] = draw.choice(values)
        try:
            reply = await client.request(method, f"{self._server.url}/{path}", headers=headers, **options)
        except httpx.HTTPError as error:
            self.faults.append(f"request {number}: {method} {path[:80]} {headers} {error!r}")
            return
        self.codes[reply.status_code] += 1
        if reply.status_code in CODES_OF_FAULTS:
            self.faults.append(f"request {number}: {method} {path[:80]} {options} {headers}: {reply.text[:500]}")
        elif reply.status_code == 200 and method == "POST" and reply.headers["content-type"] == "application/json":
            await self._rows_of(client, number, reply.json())

    def _rows(self) -> tuple[str, str, dict[str, Any]]:
        draw = self._draw
        query = {
            draw.choice(["format", "layer", "prompt", "stream", "completion", "wait", "delete"]): draw.choice(
                ["0", "-1", "true", "nan", "npy", "safetensors", "frames", "x", "9" * 30]
            )
            for _ in range(draw.randrange(3))
        }
        if query.get("wait", "0") not in ("0", "-1"):
            query["wait"] = "0.01"
        path = f"tap/rows/{urllib.parse.quote(draw.choice(NAMES))}"
        return draw.choice(["GET", "GET", "DELETE", "POST"]), path, {"params": query}

    def _completion(self) -> tuple[str, str, dict[str, Any]]:
        draw = self._draw
        given = {
            "model": "tiny", "prompt": draw.choice(["hello", ["a", "b"], [1, 2, 3], "x" * 100]),
            "max_tokens": draw.randrange(1, 4), "n": draw.choice([1, 1, 2]), "temperature": 1.0,
            "stream": draw.random() < 0.3, "vllm_xargs": {"vllm_tap": spec_text(draw)},
        }  # fmt: skip
        path = "completions"
        if draw.random() < 0.3:
            path = "chat/completions"
            given["messages"] = [{"role": "user", "content": str(given.pop("prompt"))}]
        text = json.dumps(given).encode()
        return "POST", path, {"content": mutated(draw, text) if draw.random() < 0.2 else text}

    async def _rows_of(self, client: httpx.AsyncClient, number: int, reply: Any) -> None:
        """Check that a reply that promises rows has them."""
        handle = (reply.get("kv_transfer_params") or {}).get("vllm_tap") if isinstance(reply, dict) else None
        if handle is None or "error" in handle or self._draw.random() < 0.5:
            return
        if "href" in handle:
            url = self._server.url.replace("/v1", handle["href"])
            sent = await client.get(url, headers={"Authorization": f"Bearer {KEY}"})
            if sent.status_code == 404:  # its name was chosen, and deleted or over
                return
            self.bodies = [*self.bodies[-20:], sent.content]
            with contextlib.suppress(TapError):
                await client.delete(url, headers={"Authorization": f"Bearer {KEY}"})
            num = len(samples_of(sent.content))
        else:
            num = len(self._tap.samples(reply))
        if num != len(reply["choices"]):
            self.faults.append(f"request {number}: {num} samples of {len(reply['choices'])} choices")

    def read_mutated(self, count: int) -> None:
        """Read so many mutated bodies of rows."""
        for number in range(count):
            data = mutated(self._draw, self._draw.choice(self.bodies))
            try:
                samples_of(data)
                blocks_of(data)
                self.read["read"] += 1
            except TapError as error:
                self.read[type(error).__name__] += 1
            except Exception as error:
                self.faults.append(f"body {number}: {error!r}")


def samples_of(data: bytes) -> list[Any]:
    """Return the samples of a body."""
    reader = Samples()
    for frame in body.frames(data):
        reader.add(frame)
    return reader.samples()


def blocks_of(data: bytes) -> list[Any]:
    """Return the blocks of a body."""
    reader = Blocks()
    return [block for frame in body.frames(data) for block in reader.add(frame)]


def main() -> int:
    """Run, and say what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        server = Server(ensure_model(Path(folder), "llama", "float32"), Path(folder) / "log", SETTINGS)
        fuzz = Fuzz(random.Random(options.seed), server)
        try:
            asyncio.run(fuzz.run(options.count))
            fuzz.read_mutated(options.count)
            given = {"model": "tiny", "prompt": "end", "max_tokens": 4, **HttpTap.extra_body(SPEC)}
            (sample,) = HttpTap(server.url, api_key=KEY).samples(server.post("/v1/completions", given).json())
            metrics = server.metrics()
        finally:
            server.close()
        told = (Path(folder) / "log").read_text()
    print(*fuzz.faults[:20], sep="\n")
    print(f"{options.count} requests: {dict(sorted(fuzz.codes.items()))}; the last one has {len(sample)} rows")
    print(f"{options.count} bodies: {dict(fuzz.read)}; {len(fuzz.faults)} faults; counters {metrics}")
    first = told.find("Traceback")
    print(f"{told.count('Traceback')} tracebacks in the server's log", told[first : first + 6000] if first >= 0 else "")
    return int(bool(fuzz.faults))


if __name__ == "__main__":
    sys.exit(main())
