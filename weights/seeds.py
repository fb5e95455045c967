"""Random generators that depend on a seed and a name only, never on the order in which they are used."""

from __future__ import annotations

import hashlib

import torch


def named_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator for `name` under `seed`: 63 bits of SHA-256 of both."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
