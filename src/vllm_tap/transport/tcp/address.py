"""Addresses of workers on a network: `tcp://host:port`, and `host:port` to listen on.

Used by both processes.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import socket
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from vllm_tap.errors import SpecError

SCHEME: Final = "tcp://"

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NAMESPACE: Final = "/proc/self/ns/net"


class Address(NamedTuple):
    """Host and port."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}{host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """True if nothing that is sent there leaves the host."""
        return is_loopback(self.host)


def is_network(address: str) -> bool:
    """Tell whether an address is one of a network, and no name of a Unix socket."""
    return address.startswith(SCHEME)


def parse(text: str) -> Address:
    """Read `tcp://host:port` or `host:port`; the host of an IPv6 address stands in brackets.

    Raises:
        SpecError: It is none.
    """
    try:
        parts = urlsplit(text if is_network(text) else SCHEME + text)
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.path or parts.query:
        raise SpecError(f'an address is "tcp://host:port", such as "tcp://10.0.0.7:7300", got {text!r}.')
    return Address(host, port)


def is_loopback(host: str) -> bool:
    """Tell whether a host is this one by its loopback interface."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def reachable_host(bound: str) -> str:
    """Return a host's address for others, given the one that a socket is bound to."""
    if not ipaddress.ip_address(bound).is_unspecified:
        return bound
    family = socket.AF_INET6 if ":" in bound else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            # No packet is sent: the kernel says from which address it would be.
            probe.connect(("2001:db8::1" if family == socket.AF_INET6 else "192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            return "::1" if family == socket.AF_INET6 else "127.0.0.1"


def host_id() -> bytes:
    """Return 16 bytes that tell processes which shared memory reaches from all others, as long as this host runs.

    The sockets that hand memory over belong to a network namespace: each container of a host is one of its own here.
    """
    try:
        boot, namespace = _BOOT_ID.read_text().strip(), os.readlink(_NAMESPACE)
    except OSError:
        boot, namespace = socket.gethostname(), ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).digest()[:16]
