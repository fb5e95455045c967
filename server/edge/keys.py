"""API keys. Only digests are kept, so that no log, repr or traceback can tell one."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field

_SECRET = secrets.token_bytes(32)
"""Of this process. Without it, whoever reads an id in a log could try keys until one has that id."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key that opens the server."""

    id: str
    """Names the key in logs and salts its prefix cache, as long as this process lives; another makes another id."""
    digest: bytes = field(repr=False)

    @classmethod
    def of(cls, key: str) -> ApiKey:
        """Raises ValueError, which does not quote it, for what cannot be sent as a bearer token."""
        if not re.fullmatch(r"[!-~]+", key):
            raise ValueError("an API key must be printable ASCII without white space, and not empty")
        name = hmac.new(_SECRET, key.encode(), hashlib.sha256).hexdigest()[:12]
        return cls(f"key_{name}", _digest(key.encode()))


def split_keys(text: str) -> list[str]:
    """What commas or white space separate in `text`."""
    return [key for key in re.split(r"[,\s]+", text) if key]


def keys_in(text: str) -> tuple[ApiKey, ...]:
    """The keys in `text`, separated by commas or white space. Raises ValueError when there is none, or a bad one."""
    keys = tuple(ApiKey.of(key) for key in split_keys(text))
    if not keys:
        raise ValueError("there is no API key in it")
    return keys


def find_key(keys: Iterable[ApiKey], given: bytes) -> ApiKey | None:
    """The one of `keys` that `given` is. Takes as long for each of them as for none, whatever they have in common."""
    digest = _digest(given)
    found = None
    for key in keys:
        if hmac.compare_digest(key.digest, digest):
            found = key
    return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
