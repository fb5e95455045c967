"""What is said of a grammar that cannot be used: one line, of the author's own text as little as can be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from engine.grammar import GrammarError, GrammarSpec
from engine.grammar.build import check
from engine.grammar.errors import MAX_MESSAGE_CHARS

if TYPE_CHECKING:
    from llguidance import LLTokenizer

SECRET = "SECRET" * 3

CASES: list[tuple[GrammarSpec, str]] = [
    (GrammarSpec.lark(f'stort: "{SECRET}"'), "no start rule found"),
    (GrammarSpec.lark(f'start: "{SECRET}'), "line 1, column 27: lexer error"),
    (GrammarSpec.lark(f'start: "a"\nother: $ "{SECRET}"'), "line 2, column 8: lexer error"),
    (GrammarSpec.lark(f'start: "a"\nstart: "{SECRET}"'), 'line 2, column 8: duplicate rule: "start"'),
    (GrammarSpec.lark(f"start: /({SECRET}/"), "invalid regex: unclosed group"),
    (GrammarSpec.regex(f"({SECRET}"), "invalid regex: unclosed group"),
    (GrammarSpec.regex(f"{SECRET}\n\n(?=x)"), "invalid regex: look-around, including look-ahead and look-behind, is"),
    (GrammarSpec.regex(f"{SECRET}\\b"), "invalid regex: lookarounds not supported yet; WordUnicode"),
    (GrammarSpec.regex("(" * 60_000 + SECRET + ")" * 60_000), "invalid regex: exceed the maximum number of nested"),
    (GrammarSpec.json_schema({"type": "string", "pattern": f"[{SECRET}"}), "invalid regex: unclosed character class"),
    (GrammarSpec.json_schema({"not": SECRET, "uniqueItems": True}), 'Unimplemented keys: ["not", "uniqueItems"]'),
    (GrammarSpec.json_schema({"oneOf": [{"const": SECRET}, {}]}), "oneOf constraints are not supported"),
    (GrammarSpec.json_schema({"allOf": [{"const": SECRET}, {"const": 1}]}), "Unsatisfiable schema: incompatible types"),
    (GrammarSpec.json_schema({"allOf": [{"const": SECRET}, {"const": "b"}]}), "Unsatisfiable schema: Regex is empty"),
    (GrammarSpec.json_schema({"enum": []}), "Unsatisfiable schema: anyOf is empty"),
]


@pytest.mark.parametrize(("spec", "message"), CASES, ids=[case[1] for case in CASES])
def test_a_message(library: LLTokenizer, spec: GrammarSpec, message: str) -> None:
    with pytest.raises(GrammarError) as found:
        check(spec, library, 10_000)
    text = str(found.value)
    assert text.startswith(message)
    assert "\n" not in text
    assert SECRET not in text
    assert len(text) <= MAX_MESSAGE_CHARS


def test_a_long_message_is_cut() -> None:
    assert str(GrammarError("a" * MAX_MESSAGE_CHARS)) == "a" * MAX_MESSAGE_CHARS
    assert str(GrammarError("a" * 1000)) == "a" * (MAX_MESSAGE_CHARS - 3) + "..."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("a\n b\t c", "a b c"),
        ("Parser Error: too many\n<state>\nTokens: secret", "Parser Error: too many"),
        ("lexer error: too many expressions <non-verbose/>", "lexer error: too many expressions"),
        ("panic: assertion failed: x < y\n<backtrace>\n 0: secret", "the grammar is too large"),
        ("at 3(8): bad\n   2 | start: secret\n   3 | secret\n", "line 2, column 8: bad"),
        ("at 2(8): failed to compile JSON schema: bad\n   1 | secret", "bad"),
    ],
)
def test_the_state_and_the_lines_of_the_grammar_are_left_out(raw: str, message: str) -> None:
    assert str(GrammarError(raw)) == message
