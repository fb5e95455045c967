"""HTTPS: a certificate and its key."""

from __future__ import annotations

import ssl
from pathlib import Path


class TlsError(Exception):
    """The certificate or its key cannot be used; the message is one line."""


def tls_context(certfile: Path, keyfile: Path) -> ssl.SSLContext:
    """A context for a server with the certificate (and chain) and private key in these PEM files. Raises TlsError."""
    for path in (certfile, keyfile):
        try:
            path.open("rb").close()
        except OSError as error:
            raise TlsError(f"cannot read {path}: {error.strerror}") from None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certfile, keyfile, password="")  # no password: nobody is asked for one at the terminal
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise TlsError(f"{certfile} and {keyfile} are no certificate and its unencrypted key: {reason}") from None
    return context
