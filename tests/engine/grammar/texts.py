"""Grammars over a vocabulary of bytes, and whether a text is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from engine.grammar import GrammarSpec, GrammarVocabulary, Matcher
from engine.grammar.build import build
from engine.grammar.matcher import TokenBits, num_bytes
from tests.tiny_tokenizer import SPECIAL, VOCAB_SIZE

if TYPE_CHECKING:
    from llguidance import LLTokenizer

ENDS = (257, 259)


def byte_vocabulary(vocab_size: int = VOCAB_SIZE, *, ends: tuple[int, ...] = ENDS) -> GrammarVocabulary:
    """Of tests/tiny_tokenizer.py: token i < 256 is byte i, then come four control tokens."""
    pieces = {i: bytes([i]) for i in range(256)} | {256 + i: name.encode() for i, name in enumerate(SPECIAL)}
    return GrammarVocabulary.of(pieces, range(256, VOCAB_SIZE), ends, vocab_size)


def allowed(matcher: Matcher, vocab_size: int = VOCAB_SIZE) -> set[int]:
    """The tokens that may follow."""
    bits: TokenBits = np.zeros(num_bytes(vocab_size), dtype=np.uint8)
    matcher.fill(bits)
    return {*np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist()}


def matches(matcher: Matcher, text: str) -> bool:
    """Whether `text` is in the grammar, read from where `matcher` is."""
    matcher = matcher.copy()
    for byte in text.encode():
        if byte not in allowed(matcher):
            return False
        matcher.consume(byte)
    return not allowed(matcher).isdisjoint(ENDS)


def is_in(spec: GrammarSpec, library: LLTokenizer, text: str) -> bool:
    return matches(build(spec.source(), library), text)
