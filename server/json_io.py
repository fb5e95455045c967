"""JSON from and to clients: a parser that no input can hurt, and one way to write.

The parser is pydantic's: nesting is limited to 200, an integer to 4,300 digits, text must be UTF-8 without lone
surrogates, and NaN and Infinity are no numbers. What it lets pass, a number that overflows (1e400), is looked for here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json, to_json
from starlette.responses import Response

_MAY_OVERFLOW = re.compile(rb"[eE]\+?\d{3}|\d{300}")


def parse(body: bytes) -> Any:
    """The value in `body`. Raises ValueError with a one-line reason that quotes nothing of it."""
    value = from_json(body, allow_inf_nan=False)
    if _MAY_OVERFLOW.search(body) and _has_infinity(value):
        raise ValueError("number out of range")
    return value


def dump(value: object) -> bytes:
    """Compact UTF-8 JSON. What is no number (the logits of a broken checkpoint) is null: `NaN` is no JSON."""
    return to_json(value, inf_nan_mode="null")


class JsonResponse(Response):
    """`content` as JSON."""

    media_type = "application/json"

    def __init__(self, content: object, status_code: int = 200, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(dump(content), status_code=status_code, headers=headers)


def _has_infinity(value: Any) -> bool:
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, float) and math.isinf(item):
            return True
        if isinstance(item, dict):
            todo.extend(item.values())
        elif isinstance(item, list):
            todo.extend(item)
    return False
