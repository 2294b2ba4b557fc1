#!/usr/bin/env python3
"""Rates of rows over TCP: on loopback beside iperf3, and over a link of 1 Gbit/s with and without a codec.

    python bench/tcp.py --input build/states.safetensors      # hidden states of `make bench-codecs`

A worker and a client in two processes, without an engine. The link is between two network namespaces with a token
bucket (`tc`), which takes root; there is none without. Nothing is encrypted: what is measured is links and codecs.
`--alone` has the scheduler serve this session before all others, for a machine that others use (root; under `setsid`).
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from two_nodes import HOSTS, two_hosts
from vllm_tap.bench.codecs import read_tensors
from vllm_tap.bench.machine import describe_commit, describe_machine
from vllm_tap.transport.calls import CallServer
from vllm_tap.transport.segment.pool import Block, SegmentPool
from vllm_tap.transport.tcp.access import Access
from vllm_tap.transport.tcp.fetching import Piece
from vllm_tap.transport.tcp.reader import NetworkReader
from vllm_tap.transport.tcp.server import NetworkServer
from vllm_tap.transport.tcp.settings import Settings

SECRET = b"a secret of the benchmark"
BLOCK_BYTES = 16 << 20
PORT = 7399
ITEMSIZE = 2


def enter(namespace: str) -> None:
    """Move this process into a network namespace."""
    with open(namespace) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"no way into {namespace}")


def serve(namespace: str, host: str, content: np.ndarray, pipe: Connection) -> None:
    """Be the worker: publish the same bytes to every client that names itself, in blocks."""
    if namespace != "/proc/self/ns/net":
        enter(namespace)
    pool = SegmentPool(content.nbytes + (1 << 28), shared=False)
    server = NetworkServer(
        Settings(host, 0, SECRET, is_random=False, tls=False), lambda _: pool, CallServer(bytes), itertools.count(1)
    )
    pipe.send(server.address)
    while (client := pipe.recv()) is not None:
        blocks = []
        for begin in range(0, content.nbytes, BLOCK_BYTES):
            part = content[begin : begin + BLOCK_BYTES]
            blocks.append(pool.reserve(part.nbytes))
            pool.view(blocks[-1])[:] = part.data
        server.publish(client, [block.block_id for block in blocks])
        pipe.send(blocks)


def seconds(reader: NetworkReader, content: np.ndarray, pipe: Connection, into: np.ndarray) -> float:
    """Return how long a client takes to have everything, which is checked."""
    pipe.send(reader.client)
    blocks: list[Block] = pipe.recv()
    starts = itertools.accumulate((block.nbytes for block in blocks), initial=0)
    places = list(zip(blocks, starts, strict=False))
    into[:] = 0
    begin = time.perf_counter()
    reader.fetch([Piece(b.block_id, 0, into[at : at + b.nbytes].data, ITEMSIZE) for b, at in places])
    took = time.perf_counter() - begin
    reader.release([block.block_id for block in blocks])
    assert np.array_equal(into, content)
    return took


def iperf3(host: str, prefix: list[str]) -> float:
    """Return the rate of iperf3 between the same ends, in bytes per second."""
    server = subprocess.Popen([*prefix, "iperf3", "-s", "-1", "-p", str(PORT)], stdout=subprocess.DEVNULL)
    time.sleep(0.5)
    command = ["iperf3", "-c", host, "-p", str(PORT), "-t", "2", "-J"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    server.wait()
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 8


def measure(host: str, prefix: list[str], content: np.ndarray, codecs: list[str], rounds: int) -> dict[str, object]:
    """Return the medians of rates by codec, in bytes of rows per second, with those of iperf3 in turn."""
    ours, theirs = multiprocessing.Pipe()
    namespace = f"/run/netns/{prefix[-1]}" if prefix else "/proc/self/ns/net"
    arguments = namespace, host, content, theirs
    worker = multiprocessing.get_context("fork").Process(target=serve, args=arguments, daemon=True)
    worker.start()
    address, into = ours.recv(), np.empty_like(content)
    readers = {name: NetworkReader(address, Access(SECRET, tls=False, codec=name)) for name in codecs}
    rates: dict[str, list[float]] = {name: [] for name in (*codecs, "iperf3")}
    for turn in range(rounds + 1):  # the first one warms up, and measures the link for "auto"
        for name, reader in readers.items():
            took = seconds(reader, content, ours, into)
            if turn:
                rates[name].append(content.nbytes / took)
        if turn:
            rates["iperf3"].append(iperf3(host, prefix))
    chosen = readers["auto"].meter.choose() if "auto" in codecs and readers["auto"].meter is not None else "raw"
    ours.send(None)
    worker.join(10)
    return {name: statistics.median(found) for name, found in rates.items()} | {"auto took": chosen}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="hidden states that vllm-tap capture has saved")
    parser.add_argument("--mib", type=int, default=256, help="of rows in a transfer; repeated if the file is shorter")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--alone", action="store_true", help="before all other sessions on the cores")
    options = parser.parse_args()
    if options.alone:
        Path("/proc/self/autogroup").write_text("-20")
    states = np.frombuffer(b"".join(tensor.data for tensor in read_tensors(options.input)[0]), np.uint8)
    content = np.resize(states, options.mib << 20)
    load = os.getloadavg()[0]
    results = {"loopback": measure("127.0.0.1", [], content, ["raw"], options.rounds)}
    if os.geteuid() == 0:
        with two_hosts() as (first, second):
            enter(f"/run/netns/{first[-1]}")
            host = HOSTS[second[-1]]
            results["1 Gbit/s"] = measure(host, second, content, ["raw", "auto"], options.rounds)
    command = f"python bench/tcp.py --input {options.input.name} --mib {options.mib} --rounds {options.rounds}"
    report = {
        "benchmark": "tcp",
        "command": command + " --alone" * options.alone,
        "load_average_1_min": round(load, 2),
        "commit": describe_commit(),
        "machine": describe_machine(),
        "mib": options.mib,
        "rounds": options.rounds,
        "bytes_per_second": results,
    }
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
