"""Types of flags: from the text of an argument to its value, or argparse's error."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from engine import plan

DTYPES = ("auto", "float32", "float16", "bfloat16")
BACKENDS = ("auto", "cpu", "cuda", "torch", "reference")
QUANTIZATIONS = plan.ALL_QUANTIZATIONS
KV_CACHE_DTYPES = plan.KV_CACHE_DTYPES
BOOLEAN = argparse.BooleanOptionalAction


def integer(low: int, high: int = 2**40) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low} to {high}, not {value}")
        return value

    return integer


def number(low: float, high: float, *, above: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not (low < value if above else low <= value) or not value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"must be {'above' if above else 'at least'} {low} and finite, up to {high}"
            )
        return value

    return number


def memory(text: str) -> int:
    from engine.machine import parse_memory

    try:
        return parse_memory(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def server_url(text: str) -> str:
    """Without the `/v1` that clients' base URLs end in."""
    url = text.rstrip("/").removesuffix("/v1")
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise argparse.ArgumentTypeError(f"must be like http://127.0.0.1:8000, not {text}")
    return url


COUNT: dict[str, Any] = {"type": integer(1), "metavar": "N"}
