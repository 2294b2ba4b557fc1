"""TLS of a worker: its certificate, from files or made for this process. Worker process."""

from __future__ import annotations

import datetime
import os
import ssl
import tempfile
from pathlib import Path

from vllm_tap.errors import TransportError


def server_context(certificate: str, key: str) -> tuple[ssl.SSLContext, bytes]:
    """Return a context and the certificate in DER form, from PEM files; from a new one without these.

    Raises:
        TransportError: The files cannot be read, or none can be made here.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nothing is resumed, and a ticket would look like a frame under way
    try:
        if certificate:
            context.load_cert_chain(certificate, key or None)
            return context, ssl.PEM_cert_to_DER_cert(_first(Path(certificate).read_text()))
        pem_key, pem = _new_certificate()
        with tempfile.TemporaryDirectory(prefix="vllm-tap-tls-") as folder:  # for its owner alone
            path = Path(folder, "both.pem")
            path.touch(0o600)
            path.write_bytes(pem_key + pem)
            context.load_cert_chain(path)
        return context, ssl.PEM_cert_to_DER_cert(pem.decode())
    except (OSError, ValueError) as error:
        raise TransportError(f"TLS cannot be set up with {certificate or 'a new certificate'}: {error}") from error


def _first(text: str) -> str:
    """Return the first certificate of a chain, which is the one that is shown."""
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    return text[text.index(begin) : text.index(end) + len(end)]


def _new_certificate() -> tuple[bytes, bytes]:
    """Return a new private key and a certificate for it, signed by itself, as PEM."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise TransportError(
            "a certificate cannot be made here: pip install vllm-tap[tls], or name files by VLLM_TAP_TLS_CERT and "
            "VLLM_TAP_TLS_KEY, or speak in the clear with VLLM_TAP_TLS=0."
        ) from error
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"vllm-tap-{os.getpid()}")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    signed = builder.not_valid_after(now + datetime.timedelta(days=3650)).sign(key, hashes.SHA256())
    pem_key = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return pem_key, signed.public_bytes(serialization.Encoding.PEM)
