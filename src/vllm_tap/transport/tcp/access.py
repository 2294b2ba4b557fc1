"""Who may connect: a shared secret, proved by both ends without being sent, and TLS whose certificate it vouches for.

Used by both processes. After the connection, and TLS if any, little-endian:

    client   "vtpn", u16 version, u16 role, u32 client (0 for a new one), 32 bytes nonce
    worker   "vtpn", u16 version, u16 status, 32 bytes nonce
    client   32 bytes proof
    worker   32 bytes proof, or the end of the connection

A proof is HMAC-SHA256 over a name, both messages and the SHA-256 of the worker's certificate (zeros in the clear), with
the secret and the client's token, if it has one, as the key. Somebody in the middle with a certificate of their own can
therefore not pass proofs on, whoever signed that certificate.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import socket
import ssl
import struct
from typing import Final, NamedTuple

from vllm_tap.errors import DescriptorError, SpecError, TransportError
from vllm_tap.transport.tcp.address import Address
from vllm_tap.transport.tcp.stream import Stream

MAGIC: Final = b"vtpn"
VERSION: Final = 1
PREFACE: Final = struct.Struct("<4sHHI32s")
ANSWER: Final = struct.Struct("<4sHH32s")
PROOF_BYTES: Final = 32

SESSION, CALLS, ROWS, MEMORY = 1, 2, 3, 4
"""Roles of a connection; MEMORY tells where rows lie that NIXL brings."""

ACCEPTED, WANTS_TLS, FULL = 0, 1, 2
"""Statuses of the worker's answer."""

SILENCE_SECONDS: Final = 5.0
"""Seconds that either end waits for a sign of the other."""

MIN_SECRET_BYTES: Final = 16
SECRET_VARIABLE: Final = "VLLM_TAP_SECRET"

_TLS_HANDSHAKE: Final = 0x16


class Access(NamedTuple):
    """Terms on which a client connects.

    Attributes:
        secret: Shared with the workers.
        tls: None for TLS with any certificate that the secret vouches for, except on the loopback interface, which is
            in the clear; True for TLS there too; False for rows and calls in the clear; or a context of your own, which
            may check the certificate as well.
        codec: "auto", or the name of a codec for rows.
        timeout_s: Seconds that a worker may be silent.
        num_connections: Most connections for the rows of one worker.
    """

    secret: bytes
    tls: bool | ssl.SSLContext | None = None
    codec: str = "auto"
    timeout_s: float = SILENCE_SECONDS
    num_connections: int = 4

    def context(self, address: Address) -> ssl.SSLContext | None:
        """Return the context for TLS with a worker; None for none."""
        if isinstance(self.tls, ssl.SSLContext):
            return self.tls
        wanted = not address.is_loopback if self.tls is None else self.tls
        if not wanted:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # The secret proves the certificate to be the worker's, which no authority knows.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context


class Credential(NamedTuple):
    """Name and token of a client, for connections that belong to one."""

    client: int = 0
    token: bytes = b""


NOBODY: Final = Credential()


def read_secret(given: str | bytes | None) -> bytes:
    """Return a secret as bytes: the given one, or else that of the environment.

    Raises:
        SpecError: There is none, or it is too short to be one.
    """
    given = os.environ.get(SECRET_VARIABLE) if given is None else given
    if not given:
        raise SpecError(f"a worker on a network wants a secret: pass secret=, or set {SECRET_VARIABLE}.")
    secret = given.encode() if isinstance(given, str) else bytes(given)
    if len(secret) < MIN_SECRET_BYTES:
        raise SpecError(f"a secret of {len(secret)} bytes can be guessed: make one of {MIN_SECRET_BYTES} or more.")
    return secret


def connect(address: Address, access: Access, role: int, credential: Credential = NOBODY) -> Stream:
    """Return a connection to a worker that has proved to know the secret.

    Raises:
        TransportError: Nothing answers there, the worker wants TLS or speaks none, does not know the secret, or has
            ended the session that the credential is of.
    """
    try:
        connection = socket.create_connection(address, access.timeout_s)
    except OSError as error:
        raise _refusal(
            f"no worker answers at {address} ({error}). Was it started with VLLM_TAP_LISTEN, and does a firewall let "
            "you through?",
            address,
            credential,
            error,
        ) from error
    try:
        return _introduce(connection, address, access, role, credential)
    except BaseException:
        connection.close()
        raise


def _introduce(
    connection: socket.socket, address: Address, access: Access, role: int, credential: Credential
) -> Stream:
    connection, certificate = _secured(connection, address, access)
    stream = Stream(connection, access.timeout_s)
    try:
        preface = PREFACE.pack(MAGIC, VERSION, role, credential.client, secrets.token_bytes(32))
        stream.sendall(preface)
        answer = stream.recv_exactly(ANSWER.size)
        _check_answer(answer, address)
        transcript = preface + answer + _fingerprint(certificate)
        stream.sendall(_proof(access.secret + credential.token, b"client", transcript))
        proof = stream.recv_exactly(PROOF_BYTES)
    except TimeoutError as error:
        stream.close()
        raise TransportError(
            f"what listens at {address} sends nothing for {access.timeout_s:g} s: the worker stands still, or it is "
            "another program.",
            path=str(address),
        ) from error
    except (OSError, EOFError) as error:
        stream.close()
        raise _refusal(
            f"the worker at {address} ended the connection ({error}): is the secret the one that it was started with?",
            address,
            credential,
            error,
        ) from error
    except TransportError:
        stream.close()
        raise
    if not hmac.compare_digest(proof, _proof(access.secret + credential.token, b"worker", transcript)):
        connection.close()
        raise TransportError(f"what answers at {address} does not know the secret: it is not the worker.")
    return stream


def _refusal(first: str, address: Address, credential: Credential, error: OSError | EOFError) -> TransportError:
    """Return the error of a connection that was not made: `first` for one that belongs to no session."""
    gone = f"the session with the worker at {address} has gone ({error}): capture again, in a new engine if need be."
    return TransportError(first if credential is NOBODY else gone, path=str(address))


def _secured(connection: socket.socket, address: Address, access: Access) -> tuple[socket.socket, bytes]:
    """Begin TLS, if any; return the connection and the worker's certificate."""
    context = access.context(address)
    if context is None:
        return connection, b""
    try:
        secured = context.wrap_socket(connection, server_hostname=address.host)
    except OSError as error:  # such as SSLError
        raise TransportError(
            f"no TLS with the worker at {address} ({error}). A worker that listens on loopback, or with "
            "VLLM_TAP_TLS=0, speaks in the clear: pass tls=False if that is meant.",
            path=str(address),
        ) from error
    return secured, secured.getpeercert(binary_form=True) or b""


def _check_answer(answer: bytes, address: Address) -> None:
    magic, version, status, _ = ANSWER.unpack(answer)
    if (magic, version) != (MAGIC, VERSION):
        raise DescriptorError(
            f"{address} speaks {magic!r} version {version}, this client {MAGIC!r} version {VERSION}: is it a worker, "
            "with the same vllm-tap?"
        )
    if status == WANTS_TLS:
        raise TransportError(f"the worker at {address} speaks TLS only: leave tls=False out.", path=str(address))
    if status != ACCEPTED:
        raise TransportError(f"the worker at {address} has no room for another client now.", path=str(address))


class Gate(NamedTuple):
    """Worker's terms: its secret, and TLS if it speaks any."""

    secret: bytes
    context: ssl.SSLContext | None
    certificate: bytes
    timeout_s: float = SILENCE_SECONDS

    def receive(self, connection: socket.socket) -> tuple[Stream, bytes]:
        """Begin TLS, if any; return the connection and the client's preface. Closes it where it raises.

        Raises:
            DescriptorError: The client speaks something else.
            OSError: Or it has gone, or is silent.
        """
        try:
            connection = self._secured(connection)
            stream = Stream(connection, self.timeout_s)
            preface = stream.recv_exactly(PREFACE.size)
            magic, version, role, _, _ = PREFACE.unpack(preface)
            if (magic, version) != (MAGIC, VERSION) or role not in (SESSION, CALLS, ROWS, MEMORY):
                stream.sendall(ANSWER.pack(MAGIC, VERSION, ACCEPTED, bytes(32)))  # which says what is spoken here
                raise DescriptorError(
                    f"a client speaks {magic!r} version {version} in role {role}, expected {MAGIC!r} version {VERSION}"
                )
        except BaseException:
            connection.close()
            raise
        return stream, preface

    def _secured(self, connection: socket.socket) -> socket.socket:
        connection.settimeout(self.timeout_s)
        speaks_tls = connection.recv(1, socket.MSG_PEEK) == bytes([_TLS_HANDSHAKE])
        if self.context is None and speaks_tls:
            raise DescriptorError("a client asked for TLS, which is off here")
        if self.context is None:
            return connection
        if not speaks_tls:
            with contextlib.suppress(OSError):
                connection.sendall(ANSWER.pack(MAGIC, VERSION, WANTS_TLS, bytes(32)))
            raise DescriptorError("a client spoke in the clear, and rows leave this host within TLS only")
        return self.context.wrap_socket(connection, server_side=True)

    def admit(self, stream: Stream, preface: bytes, token: bytes) -> None:
        """Have a client prove that it knows the secret, and prove the same to it.

        Raises:
            DescriptorError: It does not.
            OSError: It has gone, or is silent.
        """
        answer = ANSWER.pack(MAGIC, VERSION, ACCEPTED, secrets.token_bytes(32))
        stream.sendall(answer)
        transcript = preface + answer + _fingerprint(self.certificate)
        proof = stream.recv_exactly(PROOF_BYTES)
        if not hmac.compare_digest(proof, _proof(self.secret + token, b"client", transcript)):
            raise DescriptorError("a client does not know the secret, or the session that it belongs to has ended")
        stream.sendall(_proof(self.secret + token, b"worker", transcript))


def _fingerprint(certificate: bytes) -> bytes:
    return hashlib.sha256(certificate).digest() if certificate else bytes(32)


def _proof(key: bytes, name: bytes, transcript: bytes) -> bytes:
    return hmac.digest(key, name + transcript, "sha256")
