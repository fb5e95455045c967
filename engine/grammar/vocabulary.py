"""The bytes behind the token ids, as the grammar library wants them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarVocabulary:
    """What a grammar needs to know of a tokenizer and a model."""

    pieces: tuple[bytes, ...]
    """The bytes of each id, one entry a row of the logits; empty for an id without a token."""
    special_ids: tuple[int, ...]
    """Control tokens: no text matches them."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer; at least one."""

    @classmethod
    def of(
        cls, pieces: Mapping[int, bytes], special_ids: Collection[int], eos_token_ids: Collection[int], vocab_size: int
    ) -> GrammarVocabulary:
        """For a model with `vocab_size` logits."""
        return cls(
            pieces=tuple(pieces.get(token_id, b"") for token_id in range(vocab_size)),
            special_ids=tuple(sorted(special_ids)),
            eos_token_ids=tuple(sorted(eos_token_ids)),
        )

    def longest_piece(self) -> int:
        """Bytes of the longest token that is text."""
        special = frozenset(self.special_ids)
        return max((len(piece) for token_id, piece in enumerate(self.pieces) if token_id not in special), default=0)

    def to_library(self) -> LLTokenizer:
        """Build the trie of all tokens; some 80 ms for 50,000."""
        from llguidance import LLTokenizer, TokenizerWrapper

        return LLTokenizer(TokenizerWrapper(_Tokens(self)), eos_token=list(self.eos_token_ids))


class _Tokens:
    """The interface that TokenizerWrapper expects."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.tokens = list(vocabulary.pieces)
        self.special_token_ids = list(vocabulary.special_ids)
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        """Tokenizing is asked for to force tokens, which every grammar here turns off (engine/grammar/spec.py): the
        model is left to write an allowed text in the tokens it likes best."""
        del text
        return []
