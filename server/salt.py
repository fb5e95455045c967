"""What keeps the prefix cache of one API key from another's."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from starlette.requests import Request

from server.job import JobSpec


def salted(spec: JobSpec, request: Request) -> JobSpec:
    """`spec` with the key of `request` in its cache_salt, so that only requests of the same key share blocks.

    The time of an answer tells whether its prompt was in the cache, and so what others have asked.
    """
    key_id: str | None = getattr(request.state, "key_id", None)
    if key_id is None:
        return spec
    own = "" if spec.cache_salt is None else f":{spec.cache_salt}"
    return replace(spec, cache_salt=hashlib.sha256(f"{key_id}{own}".encode()).hexdigest())
