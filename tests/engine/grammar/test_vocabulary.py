"""What a grammar knows of the tokens."""

from __future__ import annotations

import pytest

from engine.grammar import GrammarSpec, GrammarVocabulary
from engine.grammar.build import build
from tests.engine.grammar.texts import allowed

PIECES = {0: b"<end>", 1: b"a", 2: b"\xc3", 3: b"\xa9", 5: b"aa", 6: b"long, but a control token"}


def test_every_row_of_the_logits_has_an_entry() -> None:
    vocabulary = GrammarVocabulary.of(PIECES, {6, 0}, {0}, 9)
    assert vocabulary.pieces == (b"<end>", b"a", b"\xc3", b"\xa9", b"", b"aa", PIECES[6], b"", b"")
    assert vocabulary.special_ids == (0, 6)
    assert vocabulary.eos_token_ids == (0,)
    assert vocabulary.longest_piece() == 2


def test_nothing_but_control_tokens() -> None:
    assert GrammarVocabulary.of({0: b"<end>"}, {0}, {0}, 1).longest_piece() == 0
    assert GrammarVocabulary.of({}, (), (), 0).longest_piece() == 0


@pytest.mark.parametrize("size", [7, 8, 9, 31, 32, 33, 64, 260, 1001])
def test_vocabularies_of_any_size(size: int) -> None:
    """Neither rows without a token nor bits beyond the vocabulary are ever allowed."""
    library = GrammarVocabulary.of(PIECES, {0, 6}, {0}, size).to_library()
    matcher = build(GrammarSpec.regex("(a|é)*").source(), library)
    assert allowed(matcher, size) == {0, 1, 2, 5}
    matcher.consume(2)
    assert allowed(matcher, size) == {3}


def test_several_ends() -> None:
    library = GrammarVocabulary.of(
        {0: b"</s>", 1: b"a", 2: b"<|im_end|>", 3: b"<pad>"}, {0, 2, 3}, {2, 0}, 4
    ).to_library()
    matcher = build(GrammarSpec.choice(["a"]).source(), library)
    matcher.consume(1)
    assert allowed(matcher, 4) == {0, 2}


def test_a_control_tokens_text_is_not_the_control_token() -> None:
    pieces = {0: b"<s>", 1: b"<", 2: b"s", 3: b">"}
    library = GrammarVocabulary.of(pieces, {0}, {0}, 4).to_library()
    matcher = build(GrammarSpec.choice(["<s>"]).source(), library)
    assert allowed(matcher, 4) == {1}
