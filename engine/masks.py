"""Which tokens the grammars of a batch allow: bits on the host, applied to all their rows at once on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding

from engine.grammar.errors import GrammarError
from engine.grammar.matcher import Matcher, TokenBits, num_bytes
from engine.transfers import to_device


@dataclass(frozen=True, slots=True)
class MaskedRow:
    """A row of logits with a grammar. `banned_ids` may not be chosen as long as anything else may."""

    index: int
    matcher: Matcher
    banned_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class TokenMasks:
    """For G rows of a batch, which tokens may be chosen."""

    rows: Tensor  # [G] int64, rows of the logits
    bits: Tensor  # [G, num_bytes(V)] uint8, bit t % 8 of byte t // 8 allows token t

    def apply(self, logits: Tensor) -> None:
        """Set the logits [R, V] of tokens that may not be chosen to minus infinity."""
        penalties = embedding(self.bits.int(), _penalties_of_bytes(logits)).flatten(1)
        logits.index_add_(0, self.rows, penalties[:, : logits.shape[-1]])


def fill(rows: Sequence[MaskedRow], *, vocab_size: int, device: torch.device) -> tuple[TokenMasks, dict[int, str]]:
    """The masks of `rows`, and why a row has none: its grammar cannot be followed further, and it allows anything.

    Host work that needs no result of the device: after the forward pass was started, it costs a GPU nothing.
    """
    bits = np.full((len(rows), num_bytes(vocab_size)), 0xFF, dtype=np.uint8)
    failed: dict[int, str] = {}
    for row, own in zip(rows, bits, strict=True):
        try:
            row.matcher.fill(own)
        except GrammarError as error:
            own.fill(0xFF)
            failed[row.index] = str(error)
        else:
            if row.banned_ids:
                _ban(own, row.banned_ids)
    indices = [row.index for row in rows]
    return TokenMasks(to_device(indices, torch.int64, device), to_device(bits, torch.uint8, device)), failed


def _penalties_of_bytes(logits: Tensor) -> Tensor:
    """[256, 8]: what each bit of a byte adds to its token's logit. On a CPU a table is five times as fast as a mask."""
    bits = torch.arange(256, device=logits.device).unsqueeze(1) >> torch.arange(8, device=logits.device) & 1
    return torch.zeros_like(bits, dtype=logits.dtype).masked_fill(bits == 0, -torch.inf)


def _ban(bits: TokenBits, token_ids: Sequence[int]) -> None:
    """Take `token_ids` out, unless nothing else is allowed: an answer that can only end does."""
    left = bits.copy()
    for token_id in token_ids:
        left[token_id // 8] &= 0xFF ^ (1 << token_id % 8)
    if left.any():
        bits[:] = left
