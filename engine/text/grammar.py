"""What a tokenizer tells a grammar."""

from __future__ import annotations

from engine.grammar.vocabulary import GrammarVocabulary
from engine.text.tokenizer import Tokenizer
from engine.types import EngineInfo


def grammar_vocabulary(tokenizer: Tokenizer, info: EngineInfo) -> GrammarVocabulary:
    """For an engine that says `info` of itself. An answer ends where either of the two says so."""
    vocabulary = tokenizer.vocabulary
    return GrammarVocabulary.of(
        vocabulary.pieces,
        vocabulary.special_ids,
        tokenizer.eos_token_ids.union(info.eos_token_ids),
        info.vocab_size,
    )
