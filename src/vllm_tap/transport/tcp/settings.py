"""Settings of a worker on a network: where it listens, its secret and its TLS, out of the environment. Worker process.

VLLM_TAP_LISTEN     host:port; the worker of local rank r takes port + r, or any free one for port 0
VLLM_TAP_SECRET     what clients have to know, 16 bytes or more; a random one without
VLLM_TAP_TLS        1 or 0; without, on unless the host is the loopback interface
VLLM_TAP_TLS_CERT   PEM file of a certificate and its chain; a new one, signed by itself, without
VLLM_TAP_TLS_KEY    PEM file of its private key
VLLM_TAP_WRITE_ROOT folder below which the worker writes datasets for clients of the network; nowhere without
VLLM_TAP_NIXL       1 to have clients read memory by NIXL as well, in the clear
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Mapping
from typing import Final, NamedTuple

from vllm_tap.errors import SpecError, TransportError
from vllm_tap.transport.tcp import address
from vllm_tap.transport.tcp.access import SECRET_VARIABLE, Gate, read_secret
from vllm_tap.transport.tcp.certificate import server_context

LISTEN_VARIABLE: Final = "VLLM_TAP_LISTEN"
TLS_VARIABLE: Final = "VLLM_TAP_TLS"
WRITE_VARIABLE: Final = "VLLM_TAP_WRITE_ROOT"
NIXL_VARIABLE: Final = "VLLM_TAP_NIXL"

_BACKLOG: Final = 64


class Settings(NamedTuple):
    """Terms on which a worker listens.

    Attributes:
        host: Of the interface.
        port: 0 for any.
        secret: What clients have to know.
        is_random: Whether the secret was made here, so that nobody knows it yet.
        tls: Whether to speak TLS.
        certificate: PEM file; empty for a new certificate.
        key: PEM file of its key.
        write_root: Folder below which datasets are written for clients; empty for none.
        nixl: Whether clients may read memory by NIXL.
    """

    host: str
    port: int
    secret: bytes
    is_random: bool
    tls: bool
    certificate: str = ""
    key: str = ""
    write_root: str = ""
    nixl: bool = False

    def gate(self) -> Gate:
        """Return what lets clients in.

        Raises:
            TransportError: TLS cannot be set up.
        """
        if not self.tls:
            return Gate(self.secret, None, b"")
        return Gate(self.secret, *server_context(self.certificate, self.key))

    def listen(self) -> socket.socket:
        """Return a socket that listens.

        Raises:
            TransportError: It cannot.
        """
        try:
            family = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)
        except OSError as error:
            where = address.Address(self.host, self.port)
            raise TransportError(f"the worker cannot listen on {where}: {error}. See {LISTEN_VARIABLE}.") from error


def read(environment: Mapping[str, str], local_rank: int) -> Settings | None:
    """Return the settings of a worker; None where it is to listen nowhere.

    Raises:
        SpecError: A setting that cannot be.
    """
    given = environment.get(LISTEN_VARIABLE)
    if not given:
        return None
    host, port = address.parse(given)
    text = environment.get(SECRET_VARIABLE)
    secret = read_secret(text) if text else secrets.token_urlsafe(32).encode()
    return Settings(
        host,
        port + local_rank if port else 0,
        secret,
        not text,
        _tls(environment.get(TLS_VARIABLE), host),
        environment.get("VLLM_TAP_TLS_CERT", ""),
        environment.get("VLLM_TAP_TLS_KEY", ""),
        _write_root(environment.get(WRITE_VARIABLE, "")),
        _switch(NIXL_VARIABLE, environment.get(NIXL_VARIABLE)) or False,
    )


def _write_root(given: str) -> str:
    if given and not (os.path.isabs(given) and os.path.isdir(given)):
        raise SpecError(f"{WRITE_VARIABLE} is a folder that is there, from the root on, got {given!r}.")
    return os.path.normpath(given) if given else ""


def _tls(given: str | None, host: str) -> bool:
    wanted = _switch(TLS_VARIABLE, given)
    return not address.is_loopback(host) if wanted is None else wanted


def _switch(name: str, given: str | None) -> bool | None:
    if given not in (None, "", "0", "1"):
        raise SpecError(f"{name} is 0 or 1, got {given!r}.")
    return given == "1" if given else None
