"""An engine over two hosts by vLLM's own `nnodes`: every row against Hugging Face; `python tests/two_nodes.py`.

The hosts are network namespaces with a link of 1 Gbit/s, which takes root and the commands `ip` and `tc`. Rank 0 and
the client are in one, rank 1 in the other, so that the client reads one rank's segments and fetches from the other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TESTS = Path(__file__).resolve().parent
HOSTS = {"vllm-tap-a": "10.77.0.1", "vllm-tap-b": "10.77.0.2"}
RATE = "1gbit"

ENGINE = {
    "tensor_parallel_size": 2,
    "nnodes": 2,
    "master_addr": next(iter(HOSTS.values())),
    "master_port": 29555,
    "distributed_executor_backend": "mp",
    "enforce_eager": True,
}


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True)


@contextmanager
def two_hosts(rate: str = RATE) -> Iterator[list[list[str]]]:
    """Make two namespaces with a link between them; yield what begins a command in each."""
    names = list(HOSTS)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", names[1], "netns", names[1])
        for name, address in HOSTS.items():
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            for device in (name, "lo"):
                ip("-n", name, "link", "set", device, "up")
            if rate:
                shape = ["root", "tbf", "rate", rate, "burst", "256k", "latency", "50ms"]
                subprocess.run(["tc", "-n", name, "qdisc", "add", "dev", name, *shape], check=True)
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def environment(address: str, core: int) -> dict[str, str]:
    """Return what a node of an address runs with."""
    paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
    ours = {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_HOST_IP": address,
        "GLOO_SOCKET_IFNAME": list(HOSTS)[core],
        "VLLM_CPU_OMP_THREADS_BIND": str(core),
        "VLLM_TAP_LISTEN": f"{address}:7300",
        "VLLM_TAP_SECRET": "a secret that both nodes know",
    }
    return os.environ | ours


def run_head(folder: Path) -> None:
    """Be the client, with rank 0: capture rows and experts, and compare them."""
    from engine.engines import Engine, References, compare, prompts, sequence
    from engine.test_experts import check_choice
    from vllm_tap import Spec
    from vllm_tap.client.connection import connect
    from vllm_tap.transport.tcp.reader import NetworkReader

    engine = Engine(folder, node_rank=0, **ENGINE)
    known = References(folder)
    everything = {"hidden_states": "all", "embeddings": True, "final_hidden_states": True}
    logits = {"router_logits": "all"} if connect(engine.llm).available("router_logits") else {}
    for transport in ("auto", "tcp"):
        result = engine.capture(prompts(), Spec(**everything, **logits), transport=transport)
        compare(result, known)
        print(transport, len(result), "samples,", result.num_rows, "rows: as Hugging Face", flush=True)
    ways = {rank: type(reader).__name__ for rank, reader in connect(engine.llm).readers("auto").items()}
    print("readers by rank:", ways, connect(engine.llm).network_addresses)
    assert ways[1] == NetworkReader.__name__ != ways[0], ways
    if logits:
        result = engine.capture(prompts(), Spec(routed_experts="all"), transport="auto")
        for sample, output in zip(result, result.outputs, strict=True):
            for layer, expected in known.of(sequence(output)).router_logits.items():
                check_choice(result.routing[layer], expected, sample.expert_ids[layer], sample.expert_weights[layer])
        print("experts: as Hugging Face", flush=True)
    engine.close()


def run_node(folder: Path) -> None:
    """Be the host of rank 1, as `vllm serve --headless` is."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor

    from engine.engines import ARGUMENTS

    arguments = EngineArgs(model=str(folder), node_rank=1, **ARGUMENTS, **ENGINE)
    executor = MultiprocExecutor(arguments.create_engine_config(headless=True), monitor_workers=False)
    executor.start_worker_monitor(inline=True)


def run(family: str) -> None:
    """Start both nodes and wait for the first."""
    from models import ensure_model, fingerprint

    folder = str(ensure_model(TESTS.parent / "models" / "tiny" / fingerprint(), family, "float32"))
    begin = time.monotonic()
    with two_hosts() as (first, second):
        command = [*second, sys.executable, __file__, "--node", folder]
        node = subprocess.Popen(command, env=environment(HOSTS["vllm-tap-b"], 1))
        try:
            command = [*first, sys.executable, __file__, "--head", folder]
            subprocess.run(command, env=environment(HOSTS["vllm-tap-a"], 0), check=True, timeout=600)
            print(f"{family}: {time.monotonic() - begin:.0f} s", flush=True)
        finally:
            node.terminate()
            node.wait(30)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=["llama", "qwen3_moe"])
    parser.add_argument("--head", type=Path, help="be the first node, of this model")
    parser.add_argument("--node", type=Path, help="be the second node, of this model")
    options = parser.parse_args()
    if options.head:
        run_head(options.head)
    elif options.node:
        run_node(options.node)
    else:
        for family in options.families:
            run(family)
