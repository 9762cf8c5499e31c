"""TLS contexts of DICOM associations: version 1.2 or newer, with certificates on both sides if a CA is given."""

import socket
import ssl
from pathlib import Path
from typing import Any

from app.errors import InvalidSettings

# Seconds of a blocking operation of a TLS connection, the handshake included.
HANDSHAKE_SECONDS = 30.0


class LazyHandshakeContext(ssl.SSLContext):
    """Context whose sockets begin TLS at their first read, in the thread of their association.

    pynetdicom wraps a socket in the thread that accepts connections. With the handshake there, one silent caller would
    block all others.
    """

    def wrap_socket(self, sock: socket.socket, *args: Any, **options: Any) -> ssl.SSLSocket:
        sock.settimeout(HANDSHAKE_SECONDS)
        return super().wrap_socket(sock, *args, **{**options, "do_handshake_on_connect": False})


def server_context(certificate: Path, key: Path | None, ca: Path | None) -> ssl.SSLContext:
    """Return the context of an SCP. With a CA, callers need a certificate of this CA.

    Raises
    ------
    InvalidSettings
        A file cannot be read, or key and certificate do not belong together.
    """
    context = LazyHandshakeContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, certificate, key, ca)
    if ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(certificate: Path | None, key: Path | None, ca: Path | None) -> ssl.SSLContext:
    """Return the context of an SCU. It checks the certificate and the host name of the peer.

    Raises
    ------
    InvalidSettings
        A file cannot be read, or key and certificate do not belong together.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load(context, certificate, key, ca)
    return context


def _load(context: ssl.SSLContext, certificate: Path | None, key: Path | None, ca: Path | None) -> None:
    try:
        if ca is not None:
            context.load_verify_locations(ca)
        if certificate is not None:
            context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise InvalidSettings(
            f"The TLS certificate, its key or the CA cannot be used ({type(error).__name__}).",
            expected="PEM files that exist, with a key that fits the certificate.",
            advice="Check the paths and the files (openssl x509 -in FILE -text).",
        ) from None
