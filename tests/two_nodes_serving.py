"""A server whose data parallel engines run on two hosts: every row against Hugging Face.

Run `python tests/two_nodes_serving.py`, which makes the hosts as `two_nodes.py` does. API processes and engine 0 are on
one, engine 1 on the other. Once the workers serve a network, and both engines capture; once they do not, and one does.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))

import surroundings  # noqa: F401
from two_nodes import HOSTS, TESTS, environment, two_hosts

NUM_ENGINES = 2
PARALLEL = {
    "data_parallel_size": NUM_ENGINES,
    "data_parallel_size_local": 1,
    "data_parallel_address": next(iter(HOSTS.values())),
    "data_parallel_rpc_port": 29556,
}
NUM_REQUESTS = 8


def run_head(folder: Path, num_capturing: int) -> None:
    """Be the host of the server and its client."""
    import openai

    from engine.engines import References
    from engine.test_data_parallel_serving import SPEC, compare_sample, served
    from servers import KEY, Server
    from vllm_tap import HttpTap

    with tempfile.TemporaryDirectory() as place:
        server = Server(folder, Path(place) / "log", **PARALLEL)
        tap, client = HttpTap(server.url, api_key=KEY), openai.AsyncOpenAI(base_url=server.url, api_key=KEY)
        asked = {"model": "tiny", "max_tokens": 6, "temperature": 0.0, "extra_body": tap.extra_body(SPEC)}

        async def run() -> None:
            replies = (client.completions.create(prompt=f"prompt {n}", **asked) for n in range(NUM_REQUESTS))
            for reply in await asyncio.gather(*replies):
                (sample,) = await tap.samples_async(reply)
                compare_sample(sample, references)

        references = References(folder)
        before = served(server)
        asyncio.run(run())
        counts = served(server) - before
        print(f"captured requests by engine: {dict(counts)}; rows: as Hugging Face", flush=True)
        said = [line for line in server.log.read_text().splitlines() if "captures nothing" in line]
        print(*said, sep="\n", flush=True)
        server.close()
    assert len(counts) == num_capturing, counts
    assert bool(said) == (num_capturing < NUM_ENGINES)


def node_command(folder: str) -> list[str]:
    """Return the command of the host of engine 1."""
    from engine.engines import ARGUMENTS
    from servers import COMMAND

    given = {**ARGUMENTS, **PARALLEL, "data_parallel_start_rank": 1}
    arguments = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-c", COMMAND, "serve", folder, "--headless", "--enforce-eager", *arguments]


def run(is_served: bool) -> None:
    """Start both hosts and wait for the first."""
    from models import ensure_model, fingerprint

    folder = str(ensure_model(TESTS.parent / "models" / "tiny" / fingerprint(), "llama", "float32"))
    environments = [environment(address, core) for core, address in enumerate(HOSTS.values())]
    if not is_served:
        for one in environments:
            del one["VLLM_TAP_LISTEN"]
    begin = time.monotonic()
    with two_hosts() as (first, second), tempfile.TemporaryFile() as log:
        node = subprocess.Popen([*second, *node_command(folder)], env=environments[1], stdout=log, stderr=log)
        try:
            command = [*first, sys.executable, __file__, "--head", folder, str(NUM_ENGINES if is_served else 1)]
            subprocess.run(command, env=environments[0], check=True, timeout=600)
            print(f"{'a network' if is_served else 'no network'}: {time.monotonic() - begin:.0f} s", flush=True)
        except BaseException:
            log.seek(0)
            sys.stderr.buffer.write(log.read()[-4000:])
            raise
        finally:
            node.terminate()
            node.wait(30)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head", nargs=2, help="be the first host, of this model and so many engines that capture")
    options = parser.parse_args()
    if options.head:
        run_head(Path(options.head[0]), int(options.head[1]))
    else:
        for is_served in (True, False):
            run(is_served)
