"""Certificates for tests, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def make_certificate(folder: Path, *, password: str | None = None) -> tuple[Path, Path]:
    """Certificate and key of 127.0.0.1 in `folder`, signed by themselves. Skips the test where there is no openssl."""
    if shutil.which("openssl") is None:
        pytest.skip("LEFT OUT: there is no openssl to make a certificate with, so HTTPS is not tested")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    locked = ["-noenc"] if password is None else ["-passout", f"pass:{password}"]
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-days", "2"),
            *("-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", str(certificate), "-keyout", str(key), *locked),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key
