"""JSON from files that nobody vouches for: bounded, UTF-8, no NaN, no repeated keys, no bottomless nesting."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in `data`. Raises ValueError with a one-line reason for anything else.

    Stricter than the standard parser: NaN, Infinity, numbers that overflow a double, and an object that names a key
    twice are refused, and nesting beyond the interpreter's depth is an ordinary error.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
        )
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"malformed JSON ({error.msg} at byte {error.pos})") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key[:100]!r} appears twice")
            seen.add(key)
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"number {text[:20]} is too large")
    return value
