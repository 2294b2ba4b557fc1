"""Two hosts on one machine: network namespaces with a link of a given rate; takes root, `ip` and `tc`."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

HOSTS = {"vllm-tap-a": "10.77.0.1", "vllm-tap-b": "10.77.0.2"}
RATE = "1gbit"


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
