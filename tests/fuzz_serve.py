"""Sends malformed requests for rows to a server of a tiny model: 4xx or right, never 5xx, never a dead server.

python tests/fuzz_serve.py --count 2000 --seed 0
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import tempfile
import urllib.parse
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parent / "support"))

from engine.test_serve import KEY, SPEC, Server
from models import ensure_model
from vllm_tap import HttpTap

VALUES: list[Any] = [
    None, True, -1, 0, 3, 4, 10**12, 1.5, "", "all", "last", "generated", "prompt", "x" * 1000, [], [0], [-1, 3], [99],
    ["all"], [[0]], {}, {"hidden_states": "all"}, [None], "\x00", "\ud800", float("inf"),
]  # fmt: skip
FIELDS = [*json.loads(SPEC.to_json()), "nothing", "__class__", ""]


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
    at = draw.randrange(len(text))
    return text[:at] + chr(draw.choice([0, 34, 91, 93, 123, 125, 48, 0x2603])) + text[at + draw.randrange(3) :]


def request(draw: random.Random, client: httpx.Client) -> httpx.Response:
    """Send one request."""
    if draw.random() < 0.3:
        name = draw.choice(["x", "..", "a" * 5000, "%00", "tap-", "cmpl-1", "\u2603", "a b"])
        query = {
            draw.choice(["wait", "format", "layer", "prompt", "stream"]): draw.choice(["0", "-1", "nan", "npy", "x"])
        }
        path = f"tap/rows/{urllib.parse.quote(name)}"
        return client.request(draw.choice(["GET", "DELETE", "POST"]), path, params=query)
    body = {
        "model": "tiny", "prompt": draw.choice(["hello", ["a", "b"], [1, 2, 3]]), "max_tokens": draw.randrange(1, 4),
        "n": draw.choice([1, 1, 2]), "temperature": 1.0, "stream": draw.random() < 0.3,
        "vllm_xargs": {"vllm_tap": spec_text(draw)},
    }  # fmt: skip
    headers = {"X-Request-Id": draw.choice(["one", "two", "x" * 300])} if draw.random() < 0.2 else {}
    text = json.dumps(body)
    return client.post("completions", content=text, headers={**headers, "Content-Type": "application/json"})


def main() -> int:
    """Run, and say what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(ensure_model(Path(folder), "llama", "float32"), Path(folder) / "log")
        try:
            client = httpx.Client(
                base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60, trust_env=False
            )
            codes: collections.Counter[int] = collections.Counter()
            for number in range(options.count):
                reply = request(draw, client)
                codes[reply.status_code] += 1
                if reply.status_code >= 500:
                    print(f"request {number}: {reply.status_code} {reply.text[:500]}")
            ends = client.post("completions", json={"model": "tiny", "prompt": "end", "max_tokens": 4,
                                                    **HttpTap.extra_body(SPEC)}).json()  # fmt: skip
            (sample,) = HttpTap(server.url, api_key=KEY).samples(ends)
        finally:
            server.close()
    print(f"{options.count} requests: {dict(sorted(codes.items()))}; the last one has {len(sample)} rows")
    return int(any(code >= 500 for code in codes))


if __name__ == "__main__":
    sys.exit(main())
