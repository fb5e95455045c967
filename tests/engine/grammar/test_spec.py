"""What a caller asks for, in the language of the library: texts that are in it, and texts that are not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from engine.grammar import GrammarError, GrammarSpec, GrammarVocabulary
from engine.grammar.build import build
from engine.grammar.spec import MAX_SOURCE_BYTES, lark_string
from tests.engine.grammar.texts import allowed, is_in

if TYPE_CHECKING:
    from llguidance import LLTokenizer

REGEXES: list[tuple[str, list[str], list[str]]] = [
    ("ab+", ["ab", "abbb"], ["a", "abx", "xab"]),
    ("^ab$", ["ab"], ["^ab$", "ab\n"]),
    ("", [""], ["a"]),
    ("a/b", ["a/b"], ["ab"]),
    (r"a\/b", ["a/b"], ["a\\/b"]),
    ("[/]//", ["///"], ["//"]),
    (r"\\/", ["\\/"], ["/"]),
    ("a\nb", ["a\nb"], ["a\\nb"]),
    (r"a\nb", ["a\nb"], ["anb"]),
    ("\t\r \x00", ["\t\r \x00"], [" "]),
    ("a#b //c", ["a#b //c"], ["a"]),
    ('"', ['"'], [""]),
    (".", ["x", "é", "😀"], ["\n", "xx"]),
    (r"\d{2}[^\d]\D", ["12ab"], ["1ab", "1aaa", "٣٣ab", "1234"]),
    ("é+|日本", ["éé", "日本"], ["日", "e"]),
    (r"\p{Greek}", ["ω"], ["w"]),
    ("(?i)ab", ["AB", "aB"], ["AC"]),
    ("a|b/c", ["a", "b/c"], ["a/c"]),
]


@pytest.mark.parametrize(("pattern", "good", "bad"), REGEXES, ids=[repr(case[0]) for case in REGEXES])
def test_a_regex_matches_the_whole_text(library: LLTokenizer, pattern: str, good: list[str], bad: list[str]) -> None:
    spec = GrammarSpec.regex(pattern)
    assert [text for text in good if not is_in(spec, library, text)] == []
    assert [text for text in bad if is_in(spec, library, text)] == []


CHOICES = ['say "hi"', "back\\slash", "\x7f", "\x00\x1f", "😀", "\u2028", "new\nline", "/*", "// x", "a", "ab", "日本"]


def test_a_choice_is_one_of_its_texts(library: LLTokenizer) -> None:
    spec = GrammarSpec.choice(CHOICES)
    assert [text for text in CHOICES if not is_in(spec, library, text)] == []
    others = ["", "abc", "say", "new\\nline", "\\u007f", "日"]
    assert [text for text in others if is_in(spec, library, text)] == []


@pytest.mark.parametrize("text", [*CHOICES, "\ud7ff\ue000", '"""', "%json {}", "<|im_end|>", "<[5]>"])
def test_a_string_of_lark_stands_for_itself(library: LLTokenizer, text: str) -> None:
    assert is_in(GrammarSpec.lark(f"start: {lark_string(text)}"), library, text)


SCHEMAS: list[tuple[Any, list[str], list[str]]] = [
    (True, ["1", '"a"', "null", '[1, {"a": []}]'], ["", "nul", "undefined"]),
    ({}, ["-1.5e3", "{}"], ["'a'"]),
    ({"const": 'a"\\\x7f😀'}, [r'"a\"\\\u007f😀"'], ['"a"']),
    ({"enum": ["//", "/*", "\n", None, 1.5]}, ['"//"', '"/*"', r'"\n"', "null", "1.5"], ['"\n"', '"/"']),
    ({"type": "string", "pattern": '^/"\\\\$'}, [r'"/\"\\"'], ['"/"']),
    ({"type": "string", "maxLength": 2}, ['""', '"😀😀"', r'"\n\""'], ['"abc"', '"\\ud83d\\ude00"']),
    ({"type": "integer"}, ["0", "-12"], ["1.0", "01", "+1", "1e3"]),
    ({"type": "object", "properties": {'a"\\/': {}}, "required": ['a"\\/']}, [r'{"a\"\\/":1}'], ["{}"]),
    (
        {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": False},
        ["{}", '{"a":null}'],
        ['{"b":null}', '{"a":1}', '{"a":null,"a":null}'],
    ),
]


@pytest.mark.parametrize(("schema", "good", "bad"), SCHEMAS, ids=[json.dumps(case[0]) for case in SCHEMAS])
def test_a_schema(library: LLTokenizer, schema: Any, good: list[str], bad: list[str]) -> None:
    spec = GrammarSpec.json_schema(schema)
    assert [text for text in good if not is_in(spec, library, text)] == []
    assert [text for text in bad if is_in(spec, library, text)] == []


def test_any_object(library: LLTokenizer) -> None:
    spec = GrammarSpec.json_object()
    assert is_in(spec, library, '{"a": [1, {"b": null}], "c": "d"}')
    for text in ("[]", "1", '"a"', "null", "", '{"a"}'):
        assert not is_in(spec, library, text), text


def test_white_space_is_bounded_and_only_between_the_parts(library: LLTokenizer) -> None:
    spec = GrammarSpec.json_schema({"type": "array", "items": {"type": "integer"}})
    for text in ("[1,2]", "[ 1 , 2 ]", "[\n  1,\n  2\n]", f"[\n{' ' * 16}1]"):
        assert is_in(spec, library, text), text
    for text in ("[  1]", "[\n\n1]", f"[\n{' ' * 17}1]", "[\t1]", " [1]", "[1]\n"):
        assert not is_in(spec, library, text), text


@pytest.mark.parametrize("options", [{"whitespace_pattern": "x*"}, {"lenient": True}, "junk", None])
def test_a_schema_cannot_set_the_librarys_options(library: LLTokenizer, options: object) -> None:
    spec = GrammarSpec.json_schema({"type": "array", "items": {"type": "integer"}, "x-guidance": options})
    assert is_in(spec, library, "[ 1]")
    assert not is_in(spec, library, "[x1]")
    with pytest.raises(GrammarError, match='Unimplemented keys: \\["not"\\]'):
        build(GrammarSpec.json_schema({"not": {}, "x-guidance": options}).source(), library)


LARKS: list[tuple[str, list[str], list[str]]] = [
    ('start: "a" /[0-9]+/', ["a1", "a123"], ["a"]),
    ('start: "(" start ")" | "x"', ["x", "((x))"], ["(x"]),
    ('start: "::=" | "a ::= b"', ["::=", "a ::= b"], ["a"]),
    ('start: "%llguidance {}"', ["%llguidance {}"], [""]),
    ('start: "n: " %json {"type": "integer"}', ["n: 5"], ["n: x"]),
    ('start: <[65]> "b"', ["Ab"], ["Bb"]),
    ('root ::= "a" [0-9]+', ["a1", "a123"], ["a"]),
    ('root ::= "(" root ")" | "x"', ["((x))"], ["(x"]),
    ('# GBNF\nroot ::= my-rule other_rule\nmy-rule ::= "a"\n\nother_rule ::= "b"?', ["a", "ab"], ["b"]),
    ('root  ::=\n  "a" |\n  "b"', ["a", "b"], ["ab"]),
    ('root ::= ("a" | "b")* [^0-9/"]{2,3}', ["xy", "abxyz"], ["x", "x/", 'x"']),
    (r'root ::= "\"\\\n\t" [\]\[/]', ['"\\\n\t]', '"\\\n\t/'], ['"\\\n\tx']),
    (r'root ::= "\u00e9\u4e00\U0001F600" [\u00e9\u0041-\u0043]', ["é一😀é", "é一😀B"], ["é一😀D"]),
    (r'root ::= "\x41\u0022\\u0041"', ['A"\\u0041'], ["A"]),
    ('root ::= "é/日" "%llguidance"', ["é/日%llguidance"], ["é"]),
]


@pytest.mark.parametrize(("grammar", "good", "bad"), LARKS, ids=[repr(case[0]) for case in LARKS])
def test_a_grammar_in_lark_or_gbnf(library: LLTokenizer, grammar: str, good: list[str], bad: list[str]) -> None:
    spec = GrammarSpec.lark(grammar)
    assert [text for text in good if not is_in(spec, library, text)] == []
    assert [text for text in bad if is_in(spec, library, text)] == []


@pytest.mark.parametrize(
    "grammar",
    [
        '%llguidance {}\nstart: "a"',
        'start: "a"\n%llguidance {"no_forcing": false}',
        'start: "a"\n \t %llguidance {}',
        'start: "a"\r\n%llguidance {}',
        'start: "a"\n\xa0%llguidance {}',
        '%llguidance{}\nstart: "a"',
    ],
)
def test_a_grammar_cannot_set_the_librarys_options(grammar: str) -> None:
    with pytest.raises(GrammarError, match="a grammar may not set %llguidance options"):
        GrammarSpec.lark(grammar).source()


@pytest.mark.parametrize(
    "grammar", ['start: "a" %llguidance {}', 'start: "a"\r%llguidance {}', 'start: "a"\x0b%llguidance {}']
)
def test_nor_within_a_line(library: LLTokenizer, grammar: str) -> None:
    with pytest.raises(GrammarError):
        build(GrammarSpec.lark(grammar).source(), library)


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= "SECRET', "Unexpected end of input at line 1"),
        ('root ::= "a"\nroot2 ::= "SECRET\\q"', "Invalid escape sequence \\q at line 2"),
        ('x ::= "SECRET"', "No 'root' rule found"),
        ("root ::= " + "(" * 60_000 + '"SECRET"', "maximum recursion depth exceeded"),
    ],
)
def test_gbnf_that_is_none(grammar: str, message: str) -> None:
    with pytest.raises(GrammarError) as found:
        GrammarSpec.lark(grammar).source()
    assert str(found.value).startswith(f"the grammar is no GBNF: {message}")
    assert "SECRET" not in str(found.value)


def specs_of(size: int) -> dict[str, GrammarSpec]:
    """Whose texts have about `size` bytes; half as many characters."""
    return {
        "schema": GrammarSpec.json_schema({"const": "é" * (size // 2)}),
        "regex": GrammarSpec.regex("é" * (size // 2)),
        "choice": GrammarSpec.choice(["é" * (size // 2)]),
        "lark": GrammarSpec.lark(f'start: "{"é" * (size // 2)}"'),
        "gbnf": GrammarSpec.lark(f'root ::= "{"é" * (size // 2)}"'),
    }


@pytest.mark.parametrize("kind", ["schema", "regex", "choice", "lark", "gbnf"])
def test_the_size_is_limited(kind: str) -> None:
    overhead = len(specs_of(0)[kind].source())
    size = MAX_SOURCE_BYTES - overhead - (MAX_SOURCE_BYTES - overhead) % 2
    assert MAX_SOURCE_BYTES - 1 <= len(specs_of(size)[kind].source().encode()) <= MAX_SOURCE_BYTES
    with pytest.raises(GrammarError) as found:
        specs_of(size + 2)[kind].source()
    assert str(found.value) == f"the grammar is {overhead + size + 2} bytes long, at most {MAX_SOURCE_BYTES} are taken"


@pytest.mark.parametrize(
    "spec",
    [
        GrammarSpec.regex("\ud800"),
        GrammarSpec.choice(["\udfff"]),
        GrammarSpec.json_schema({"const": "\ud800"}),
        GrammarSpec.lark('start: "\ud800"'),
        GrammarSpec.lark('root ::= "\\ud800"'),
    ],
    ids=lambda spec: spec.kind,
)
def test_half_a_surrogate_pair(spec: GrammarSpec) -> None:
    with pytest.raises(GrammarError, match="half of a surrogate pair"):
        spec.source()


@pytest.mark.parametrize("text", ["\n" * 200_000, " " * 200_000, "a" * 200_000, "a\n" * 100_000, "a " * 100_000])
def test_looking_for_what_a_grammar_is_takes_no_time(text: str) -> None:
    """A search that goes back and forth would take minutes."""
    assert GrammarSpec.lark(text).source().endswith(text)


def test_a_model_may_write_in_the_tokens_it_likes() -> None:
    """Where one text is left, it may come in one token or in many."""
    pieces = {0: b"a", 1: b"b", 2: b"c", 3: b"ab", 4: b"abc", 5: b"abcd", 6: b"bc", 7: b""}
    library = GrammarVocabulary.of(pieces, [7], [7], 8).to_library()
    matcher = build(GrammarSpec.choice(["abc"]).source(), library)
    assert allowed(matcher, 8) == {0, 3, 4}
    matcher.consume(0)
    assert allowed(matcher, 8) == {1, 6}


@pytest.mark.parametrize(("pattern", "whole"), [("yes\\", False), ("\\", False), ("a\\\\", True), ("a\\\\\\", False)])
def test_an_escape_must_be_whole(pattern: str, whole: bool) -> None:
    """A backslash at the end would be left out in silence."""
    if whole:
        assert GrammarSpec.regex(pattern).source()
        return
    with pytest.raises(GrammarError, match="middle of an escape"):
        GrammarSpec.regex(pattern).source()
