"""Servers of one model whose data parallel engines are balanced from outside: every row against Hugging Face.

Run `python tests/balanced_serving.py [external] [multi-port] [hybrid]`, by default all: a server for each engine, one
command for the servers of all engines, and two servers of two engines each. The engines share a model with experts.
"""

from __future__ import annotations

import argparse
import asyncio
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "support"))
sys.path.insert(0, str(Path(__file__).parent))

import surroundings  # noqa: F401

FAMILY = "qwen3_moe"
NUM_REQUESTS = 6
NUM_OF_MODE = {"external": 2, "multi-port": 2, "hybrid": 4}


def free_port() -> int:
    """Return a port on which nothing listens, nor on the next one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def servers(mode: str, folder: Path, logs: Path) -> Iterator[list[str]]:
    """Run the servers of a mode; yield their addresses."""
    from servers import Server

    num, master = NUM_OF_MODE[mode], {"data_parallel_address": "127.0.0.1", "data_parallel_rpc_port": free_port()}
    common = {"data_parallel_size": num, "api_server_count": 1, **master}
    each: list[dict[str, Any]]
    if mode == "external":
        each = [{"data_parallel_rank": rank} for rank in range(num)]
    elif mode == "hybrid":
        halves = [{"data_parallel_size_local": 2, "data_parallel_start_rank": start} for start in (0, 2)]
        each = [{"data_parallel_hybrid_lb": True, **half} for half in halves]
    else:
        each = [{"data_parallel_multi_port_external_lb": True, "data_parallel_size_local": num}]
    places = [logs / str(number) for number in range(len(each))]
    for place in places:
        place.mkdir()
    with ExitStack() as running, ThreadPoolExecutor() as pool:
        started = pool.map(
            lambda place, options: Server(folder, place / "log", **common, **options), places, each
        )  # each waits for the others
        found = []
        for server in started:
            running.callback(server.close)
            found.append(server.url)
        if mode == "multi-port":
            host, port = found[0].removesuffix("/v1").rsplit(":", 1)
            found.append(f"{host}:{int(port) + 1}/v1")
        yield found


def check(mode: str, folder: Path) -> None:
    """Capture from all servers of a mode at a time."""
    import openai

    from engine.engines import References
    from engine.engines import surroundings as with_variables
    from engine.test_data_parallel_serving import SPEC, compare_sample, served
    from runners import expert_environment
    from servers import KEY
    from vllm_tap import HttpTap

    begin, references = time.monotonic(), References(folder)

    async def captured(url: str) -> tuple[int, list[str]]:
        """Return how many rows came, and the engines that served."""
        tap, client = HttpTap(url, api_key=KEY), openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0)

        async def ask(extra: dict[str, Any]) -> list[Any]:
            asked = {"model": "tiny", "max_tokens": 6, "temperature": 0.0, "extra_body": extra}
            running = (client.completions.create(prompt=f"prompt {n}", **asked) for n in range(NUM_REQUESTS))
            return await asyncio.gather(*running)

        plain, replies = await ask({}), await ask(tap.extra_body(SPEC))
        assert [reply.choices[0].text for reply in replies] == [reply.choices[0].text for reply in plain]
        rows = 0
        for reply in replies:
            (sample,) = await tap.samples_async(reply)
            compare_sample(sample, references)
            rows += len(sample)
        return rows, sorted(served(SimpleNamespace(url=url)))

    async def all_of(urls: list[str]) -> list[tuple[int, list[str]]]:
        return await asyncio.gather(*map(captured, urls))

    with (
        tempfile.TemporaryDirectory() as logs,
        with_variables(expert_environment(2)),
        servers(mode, folder, Path(logs)) as urls,
    ):
        found = asyncio.run(all_of(urls))
    assert sorted(engine for _, engines in found for engine in engines) == [str(n) for n in range(NUM_OF_MODE[mode])]
    text = "; ".join(f"engines {', '.join(engines)}: {rows} rows" for rows, engines in found)
    print(f"{mode}, as Hugging Face's: {text} ({time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modes", nargs="*", choices=[*NUM_OF_MODE, []], help="by default all")
    from models import ensure_model, fingerprint

    model = ensure_model(Path(__file__).parents[1] / "models" / "tiny" / fingerprint(), FAMILY, "float32")
    for one in parser.parse_args().modes or NUM_OF_MODE:
        check(one, model)
