"""Requests per second and time between tokens of a server, with and without captures, by vLLM's own `vllm bench serve`.

Two servers of one model, of which one works at a time: plain `vllm serve` without this package, and `vllm-tap serve`.
In every round each arm sends the same prompts, in random order. Two processes read the rows of captured requests to the
end, beside requests that run, and have the server let go of them. Time runs until all are there.

python bench/serve_load.py --model models/SmolLM2-135M-Instruct
bash bench/gpu.sh python3 bench/serve_load.py --shape llama-8b --requests 256 --at-a-time 64 --output 128
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import surroundings  # noqa: F401, I001
import vllm
from gpu_models import write_config, write_tokenizer
from vllm.benchmarks import serve as vllm_bench
from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS, OPENAI_COMPATIBLE_BACKENDS
from vllm.utils.argparse_utils import FlexibleArgumentParser

from servers import KEY, Server
from vllm_tap import HttpTap, Spec
from vllm_tap.bench.machine import describe_command, describe_commit, describe_machine
from vllm_tap.frame import body
from vllm_tap.vllm.launch import describe_devices

PLAIN, IDLE = "plain vllm serve", "none"
MODES = {"last position, all layers": ("all", "last"), "all positions, 4 layers": (4, "all")}
SHARES = {"10 %": 10, "all": 1}
"""Of requests that are captured: every so many-th."""

SERVER: dict[str, Any] = {
    "dtype": "float32", "max_model_len": None, "max_num_batched_tokens": 2048, "max_num_seqs": 256,
    "api_server_count": 1, "chat_template": None, "no_enable_prefix_caching": True, "served_model_name": "model",
}  # fmt: skip
"""In float32: processors without instructions for bfloat16 take six times as long for it."""

SETTINGS = {"max_bytes": 8 << 30, "budget_bytes": 8 << 30}
"""Of ours: with rows of all positions, requests that run at once have some gigabytes."""

ON_GPU: dict[str, Any] = {
    "dtype": "bfloat16", "load_format": "dummy", "max_model_len": 4096, "max_num_batched_tokens": 8192,
    "enforce_eager": None, "kv_cache_memory_bytes": 20 << 30, "gpu_memory_utilization": 0.4,
}  # fmt: skip
"""Of servers of a shape of `gpu_models.py`, both on one GPU: over those above."""

ENDED = body.encode("end")
"""The last bytes of rows that are complete."""

NUM_READERS = 2
"""Processes that read rows."""


class Arm(NamedTuple):
    """Load on a server.

    Attributes:
        name: What is captured, and of how many requests.
        spec: What is captured.
        every: Of how many requests one is captured.
        is_plain: Whether the server is without this package.
    """

    name: str
    spec: Spec | None = None
    every: int = 1
    is_plain: bool = False


class Load:
    """What sends requests: vLLM's benchmark, in this process."""

    def __init__(self, options: argparse.Namespace, model: Path, servers: dict[bool, Server]) -> None:
        self._options, self._model, self._servers = options, model, servers
        OPENAI_COMPATIBLE_BACKENDS.append("vllm-tap")
        ASYNC_REQUEST_FUNCS["vllm-tap"] = ASYNC_REQUEST_FUNCS["openai"]  # a choice; each arm has its own
        os.environ["OPENAI_API_KEY"] = KEY

    def run(self, arm: Arm, seed: int) -> dict[str, float]:
        """Send all requests of an arm; return what vLLM's benchmark measured, and what it cost the server."""
        server = self._servers[arm.is_plain]
        options, parser = self._options, FlexibleArgumentParser()
        vllm_bench.add_cli_args(parser)
        given = {
            "backend": "vllm-tap", "base_url": server.url.removesuffix("/v1"),
            "model": str(self._model), "served_model_name": "model", "dataset_name": "random", "seed": seed,
            "random_input_len": options.input, "random_output_len": options.output,
            "random_range_ratio": options.spread, "num_prompts": options.requests,
            "max_concurrency": options.at_a_time, "temperature": 0, "ready_check_timeout_sec": 0,
        }  # fmt: skip
        arguments = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        parsed = parser.parse_args([*arguments, "--ignore-eos", "--disable-tqdm"])

        async def whole() -> dict[str, Any]:
            async with _Rows(arm, server) as rows:
                ASYNC_REQUEST_FUNCS["vllm-tap"] = rows.request
                found = dict(await vllm_bench.main_async(parsed))
                begin = time.monotonic()
                num_bytes = await rows.all()
            duration = found["duration"] + time.monotonic() - begin
            return {**found, "rate": options.requests / duration, "row_bytes": num_bytes}

        begin_s, own_s, begin = server.cpu_seconds(), time.process_time(), time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()) as told:
            found = asyncio.run(whole())
        if found["completed"] != options.requests:
            raise SystemExit(
                f"{arm.name}: {found['completed']} of {options.requests} requests\n{told.getvalue()}\n"
                f"The server said last:\n{server.log.read_text()[-4000:]}"
            )
        return {
            "requests_per_s": found["rate"],
            "itl_ms": found["mean_itl_ms"],
            "p99_itl_ms": found["p99_itl_ms"],
            "cpu_ms": (server.cpu_seconds() - begin_s) * 1e3 / options.requests,
            # Of a core: near 1 this process is what limits the rate, or adds to the time between tokens.
            "client_share": (time.process_time() - own_s) / (time.monotonic() - begin),
            "row_bytes": found["row_bytes"],
        }


class _Rows:
    """Requests by vLLM's own function, of which some are captured, and processes that read their rows."""

    def __init__(self, arm: Arm, server: Server) -> None:
        self._arm, self._address, self._numbers = arm, server.url.split("/")[2], itertools.count()
        self._send = ASYNC_REQUEST_FUNCS["openai"]
        self._readers: list[tuple[asyncio.subprocess.Process, asyncio.Lock]] = []
        self._reading: list[asyncio.Task[int]] = []

    async def __aenter__(self) -> _Rows:
        command = [sys.executable, str(Path(__file__).with_name("row_reader.py")), self._address, KEY, ENDED.hex()]
        pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
        for _ in range(NUM_READERS if self._arm.spec else 0):
            self._readers.append((await asyncio.create_subprocess_exec(*command, **pipes), asyncio.Lock()))
        return self

    async def __aexit__(self, *_: object) -> None:
        for process, _ in self._readers:
            process.stdin.close()
            await process.wait()

    async def request(self, request_func_input: Any, session: Any, pbar: Any = None) -> Any:
        """Send a request."""
        if self._arm.spec is None or next(self._numbers) % self._arm.every:
            return await self._send(request_func_input, session, pbar)
        request_func_input.request_id = uuid.uuid4().hex
        extra = HttpTap.extra_body(self._arm.spec)
        request_func_input.extra_body = {**(request_func_input.extra_body or {}), **extra}
        output = await self._send(request_func_input, session, pbar)
        self._reading.append(asyncio.create_task(self._read(request_func_input.request_id)))
        return output

    async def _read(self, name: str) -> int:
        """Have the rows of a request read; return their bytes."""
        process, lock = self._readers[len(self._reading) % len(self._readers)]
        async with lock:
            process.stdin.write(f"/v1/tap/rows/{name}?delete=true\n".encode())
            told = await process.stdout.readline()
        if not told:
            raise SystemExit(f"{self._arm.name}: rows could not be read")
        return int(told)

    async def all(self) -> int:
        """Wait for all rows; return their bytes."""
        return sum(await asyncio.gather(*self._reading))


def arms(num_layers: int) -> list[Arm]:
    """Return all arms; the plain server first."""
    found = [Arm(PLAIN, is_plain=True), Arm(IDLE)]
    for mode, (layers, positions) in MODES.items():
        chosen = layers if layers == "all" else [num_layers * number // layers for number in range(layers)]
        spec = Spec(hidden_states=chosen, positions=positions)
        found += [Arm(f"{mode}, {share} of requests", spec, every) for share, every in SHARES.items()]
    return found


def measure(load: Load, given: list[Arm], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """Return a row for each arm: medians of rounds, and of the ratios to the plain server within a round.

    Args:
        load: Sends the requests.
        given: The arms.
        rounds: Most of them.
        seconds: No round begins after so many.
    """
    end = time.monotonic() + seconds
    draw = random.Random(0)
    for arm in given:
        print(f"# warming up, {arm.name}: {load.run(arm, 0)['requests_per_s']:.2f} requests/s", flush=True)
    found: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in given}
    for number in range(1, rounds + 1):
        if number > 1 and time.monotonic() > end:
            break
        for arm in draw.sample(given, len(given)):
            found[arm.name].append(load.run(arm, number))
            print(f"# round {number}, {arm.name}: {found[arm.name][-1]['requests_per_s']:.2f} requests/s", flush=True)
    return [_row(name, of_arm, found[PLAIN]) for name, of_arm in found.items()]


def _row(name: str, mine: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, Any]:
    def ratio(field: str, power: int) -> float:
        return statistics.median((one[field] / two[field]) ** power for one, two in zip(mine, plain, strict=True))

    medians = {field: statistics.median(one[field] for one in mine) for field in mine[0]}
    return {
        "arm": name,
        **medians,
        "requests_ratio": ratio("requests_per_s", 1),
        "itl_ratio": ratio("itl_ms", -1),
        "cpu_ratio": ratio("cpu_ms", -1),
        "all_requests_per_s": [one["requests_per_s"] for one in mine],
    }


def main() -> None:
    """Run the benchmark, print its results and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder of a model")
    source.add_argument("--shape", choices=["llama-8b", "qwen3-30b-a3b"], help="dummy weights of this shape, on a GPU")
    parser.add_argument("--rounds", type=int, default=20, help="at most")
    parser.add_argument("--seconds", type=float, default=600, help="no round begins after so many")
    parser.add_argument("--requests", type=int, default=32, help="in a round, of each arm")
    parser.add_argument("--at-a-time", type=int, default=16)
    parser.add_argument("--input", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=32, help="tokens to generate for it")
    parser.add_argument("--spread", type=float, default=0.5, help="part of these by which requests differ")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model, more = options.model, {}
        if options.shape:
            model, more = Path(folder) / options.shape, ON_GPU
            write_config(model, options.shape)
            write_tokenizer(model, options.shape)

        def start(is_plain: bool) -> Server:
            server = Server(model, Path(folder) / f"{is_plain}", SETTINGS, is_plain=is_plain, **(SERVER | more))
            stack.callback(server.close)
            return server

        with ThreadPoolExecutor() as pool:
            servers = dict(zip((True, False), pool.map(start, (True, False)), strict=True))
        num_layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
        rows = measure(Load(options, model, servers), arms(num_layers), options.rounds, options.seconds)
    results = {
        "benchmark": "serve",
        "command": f"python {describe_command(sys.argv)}",
        "commit": describe_commit(),
        "machine": {**describe_machine(), "vllm": vllm.__version__, "devices": describe_devices()},
        "model": model.name,
        "rounds": len(rows[0]["all_requests_per_s"]),
        **{name: getattr(options, name) for name in ("requests", "at_a_time", "input", "output", "spread")},
        "rows": rows,
    }
    if options.out:
        options.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
