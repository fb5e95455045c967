"""Fields of a body beyond those of its model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from server.errors import BadRequestError

log = logging.getLogger(__name__)


def check_extras(extra: Mapping[str, Any] | None, *, not_built: Sequence[str] = ()) -> None:
    """A documented field that is not built is refused; an unknown one is ignored, and the log can tell.

    Raises BadRequestError. `null` means absent here too.
    """
    given = extra or {}
    for name in not_built:
        if given.get(name) is not None:
            raise BadRequestError(f"{name} is not supported by this server.", param=name)
    if given:
        log.debug("ignored unknown fields: %r", [name[:50] for name in islice(given, 20)])
