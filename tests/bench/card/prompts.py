"""Prompts that every process and every engine makes alike."""

from __future__ import annotations

from random import Random

FIRST_ID = 10
"""Those before it mean something to many models."""


def prompt(name: str, length: int, vocab_size: int) -> list[int]:
    """Token ids that depend on `name` alone."""
    return Random(name).choices(range(FIRST_ID, vocab_size), k=length)
