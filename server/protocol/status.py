"""What the server says of itself in one word."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class Health(TypedDict):
    status: Literal["ok", "loading"]


class Readiness(TypedDict):
    status: Literal["ready"]


class Version(TypedDict):
    version: str


class Reset(TypedDict):
    status: Literal["reset"]
