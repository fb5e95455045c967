"""JSON from and to clients: a parser that no input can hurt, and one way to write.

The parser is pydantic's: nesting is limited to 200, an integer to 4,300 digits, text must be UTF-8 without lone
surrogates. What is no finite number (NaN, Infinity, 1e400) is looked for here, so that the answer can name its field.
"""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json, to_json
from starlette.responses import Response

_MAY_NOT_BE_FINITE = re.compile(rb"NaN|Infinity|[eE]\+?\d{3}|\d{300}")

_MAX_NAME = 64


class NotFiniteError(ValueError):
    """A number that is none or out of range. `field` is the field of the body that holds it, if it has a plain name."""

    def __init__(self, name: str) -> None:
        super().__init__("number out of range")
        self.field = name if name.isidentifier() and len(name) <= _MAX_NAME else None


def parse(body: bytes) -> Any:
    """The value in `body`. Raises NotFiniteError, or ValueError with a one-line reason that quotes nothing of it."""
    value = _from_json(body)
    if _MAY_NOT_BE_FINITE.search(body):
        for name, item in value.items() if isinstance(value, dict) else [("", value)]:
            if _has_not_finite(item):
                raise NotFiniteError(name)
    return value


def _from_json(body: bytes) -> Any:
    """Without the collector of cycles, of which there are none here: it would go over all lists again and again."""
    gc.disable()
    try:
        return from_json(body)
    finally:
        gc.enable()


def dump(value: object) -> bytes:
    """Compact UTF-8 JSON. What is no number (the logits of a broken checkpoint) is null: `NaN` is no JSON."""
    return to_json(value, inf_nan_mode="null")


class JsonResponse(Response):
    """`content` as JSON."""

    media_type = "application/json"

    def __init__(self, content: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(dump(content), status_code=status_code, headers=headers)


def _has_not_finite(value: Any) -> bool:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, float) and not math.isfinite(item):
            return True
        if isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
    return False
