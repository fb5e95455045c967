"""Matcher: one sequence's place in its grammar."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.grammar.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher

TokenBits = NDArray[np.uint8]
"""[num_bytes(V)]: bit t % 8 of byte t // 8 says that token t may follow. Token 10 is bit 2 of byte 1."""

SECONDS_PER_TOKEN = 0.001
"""Of processor time, that a grammar may take in the long run: what all others in the batch wait for."""

BURST_SECONDS = 0.5
"""And so much more at times: the first tokens take the longest. All who follow one grammar share it."""


def num_bytes(vocab_size: int) -> int:
    """Bytes of a row of token bits: a bit a token, in whole words of 32 bits."""
    return -(-vocab_size // 32) * 4


class Budget:
    """The time that is left to one grammar. Raises GrammarError when it is used up."""

    __slots__ = ("_seconds_left",)

    def __init__(self) -> None:
        self._seconds_left = BURST_SECONDS

    def earn_token(self) -> None:
        self._seconds_left = min(self._seconds_left + SECONDS_PER_TOKEN, BURST_SECONDS)

    def spend(self, seconds: float) -> None:
        self._seconds_left -= seconds
        if self._seconds_left < 0:
            raise GrammarError("the grammar takes too long to follow; make it simpler")


class Matcher:
    """Which tokens may follow, and what did. Used by one thread.

    `end_ids` are the end-of-sequence tokens.
    """

    __slots__ = ("_budget", "_inner", "end_ids")

    def __init__(self, inner: LLMatcher, end_ids: Sequence[int], budget: Budget) -> None:
        self._inner = inner
        self._budget = budget
        self.end_ids = end_ids

    def copy(self) -> Matcher:
        """Another at the same place; what was learned of the grammar is shared, and so is its time. Some 10
        microseconds."""
        return Matcher(self._inner.deep_copy(), self.end_ids, self._budget)

    def fill(self, bits: TokenBits) -> None:
        """Write which tokens may follow; at a possible end, the end-of-sequence tokens are among them.

        Raises GrammarError when the grammar is too large to be followed further, or takes too long.
        """
        assert bits.flags.c_contiguous
        begin = time.thread_time()
        self._inner.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if self._inner.is_error():
            raise GrammarError(self._inner.get_error())
        self._budget.spend(time.thread_time() - begin)

    def consume(self, token_id: int) -> None:
        """Go on by a token that may follow and is not an end-of-sequence token. Raises GrammarError as `fill`."""
        begin = time.thread_time()
        if not self._inner.consume_token(token_id):
            raise GrammarError(self._inner.get_error())
        self._budget.earn_token()
        self._budget.spend(time.thread_time() - begin)

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow."""
        return self._inner.is_stopped()
