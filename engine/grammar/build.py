"""The text of a grammar -> a matcher, within limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from engine.grammar.errors import GrammarError
from engine.grammar.matcher import Budget, Matcher, num_bytes
from engine.grammar.schema import shortest
from engine.grammar.spec import GrammarSpec

if TYPE_CHECKING:
    from llguidance import LLParserLimits, LLTokenizer

_PROBED_TOKENS = 32


def build(source: str, tokenizer: LLTokenizer) -> Matcher:
    """A matcher at the beginning of the grammar. Raises GrammarError when llguidance refuses it.

    Takes a millisecond for an ordinary schema and, at worst, seconds; other threads run meanwhile.
    """
    from llguidance import LLMatcher

    inner = LLMatcher(tokenizer, source, log_level=0, limits=_limits())
    if inner.is_error():
        raise GrammarError(inner.get_error())
    return Matcher(inner, tuple(tokenizer.eos_tokens), Budget())


def check(spec: GrammarSpec, tokenizer: LLTokenizer, max_chars: int) -> str:
    """The grammar's text, if it can be built and followed to an end within `max_chars` characters.

    Raises GrammarError otherwise. The grammar is followed for some tokens, because some are too large only then. Its
    beginning tells the most: it is where all alternatives are still open.
    """
    source = spec.source()
    if spec.kind == "json_schema":
        length = shortest(json.loads(spec.text))
        if length > max_chars:
            how = "no end" if length == float("inf") else f"at least {length:.0f} characters"
            raise GrammarError(f"every answer to this schema has {how}, more than the context holds")
    _follow(build(source, tokenizer), tokenizer)
    return source


def _follow(matcher: Matcher, tokenizer: LLTokenizer) -> None:
    """Go on by the first token that may follow, for some tokens or to the end. Raises GrammarError."""
    bits = np.zeros(num_bytes(tokenizer.vocab_size), dtype=np.uint8)
    for _ in range(_PROBED_TOKENS):
        if matcher.is_complete:
            return
        matcher.fill(bits)
        allowed = np.unpackbits(bits, bitorder="little")
        allowed[tokenizer.eos_tokens] = 0
        if not allowed.any():
            return
        matcher.consume(int(allowed.argmax()))


def _limits() -> LLParserLimits:
    """Bounds of a step, which takes up to 0.1 s when a grammar is as ambiguous as it can be: Matcher bounds their sum.
    And of what a grammar may learn while it is followed, at one or two kilobytes a state. Errors do not quote the
    grammar."""
    from llguidance import LLParserLimits

    return LLParserLimits(step_lexer_fuel=100_000, step_max_items=50_000, max_lexer_states=50_000, verbose_errors=False)
