"""What is built, and what is refused because it could not be followed to an end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from engine.grammar import GrammarError, GrammarSpec, GrammarVocabulary
from engine.grammar.build import build, check
from tests.engine.grammar.texts import ENDS, allowed, matches
from tests.random_schemas import random_schema

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MANY = 100_000

SPECS = [
    GrammarSpec.json_object(),
    GrammarSpec.json_schema(True),
    GrammarSpec.json_schema({"type": "array", "items": {"$ref": "#"}}),
    GrammarSpec.json_schema({"enum": [f"value {i}" for i in range(10_000)]}),
    GrammarSpec.json_schema({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(400)}}),
    GrammarSpec.regex("[a-z]+"),
    GrammarSpec.regex(""),
    GrammarSpec.choice(["a", "b"]),
    GrammarSpec.lark('start: "(" start ")" | "x"'),
    GrammarSpec.lark('root ::= "x"+'),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: f"{spec.kind} {spec.text[:30]}")
def test_a_good_grammar_is_its_source(library: LLTokenizer, spec: GrammarSpec) -> None:
    assert check(spec, library, MANY) == spec.source()
    assert allowed(build(spec.source(), library))


@pytest.mark.parametrize("seed", range(100))
def test_random_schemas_are_taken(library: LLTokenizer, seed: int) -> None:
    spec = GrammarSpec.json_schema(random_schema(seed).schema)
    assert check(spec, library, 2048) == spec.source()


HOPELESS: dict[str, tuple[GrammarSpec, str]] = {
    "no end": (
        GrammarSpec.json_schema({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}),
        "every answer to this schema has no end, more than the context holds",
    ),
    "a billion items": (
        GrammarSpec.json_schema({"type": "array", "minItems": 10**9}),
        "every answer to this schema has at least 2000000001 characters, more than the context holds",
    ),
    "10^400 items": (
        GrammarSpec.json_schema({"type": "array", "minItems": 10**400}),
        "every answer to this schema has at least 2000000000000001 characters, more than the context holds",
    ),
    "nothing matches": (GrammarSpec.json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "Unsatisfiable"),
    "false": (GrammarSpec.json_schema(False), "Unsatisfiable schema"),
    "a million ways": (
        GrammarSpec.json_schema(
            {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(4)]} for i in range(12)]}
        ),
        "schema too large",
    ),
    "many ways at once": (
        GrammarSpec.json_schema({"type": "object", "properties": {f"k{i}": {} for i in range(1000)}}),
        "Parser Error: Current row has 4007 items; max is 2000",
    ),
    "counts of counts": (GrammarSpec.regex("((a{1,1000}){1,1000}){1,1000}"), "lexer error: too many expressions"),
    "60,000 groups": (GrammarSpec.regex("(" * 60_000 + "a" + ")" * 60_000), "invalid regex: exceed the maximum number"),
    "60,000 brackets": (GrammarSpec.lark(f"start: {'(' * 60_000}'a'{')' * 60_000}"), "line 1, column"),
    "another document": (
        GrammarSpec.json_schema({"$ref": "http://example.com/schema.json"}),
        "Resource 'http://example.com/schema.json' is not present",
    ),
    "a file": (GrammarSpec.json_schema({"$ref": "file:///etc/passwd"}), "Resource 'file:///etc/passwd' is not present"),
    "not": (GrammarSpec.json_schema({"not": {"type": "null"}}), 'Unimplemented keys: ["not"]'),
    "a type that is none": (GrammarSpec.json_schema({"type": "float"}), "Invalid type: float"),
}


@pytest.mark.parametrize(("spec", "message"), HOPELESS.values(), ids=HOPELESS)
def test_a_hopeless_grammar_is_refused(library: LLTokenizer, spec: GrammarSpec, message: str) -> None:
    with pytest.raises(GrammarError) as found:
        check(spec, library, MANY)
    assert str(found.value).startswith(message)


def test_the_shortest_answer_must_fit_the_context(library: LLTokenizer) -> None:
    spec = GrammarSpec.json_schema({"type": "array", "items": {"type": "integer"}, "minItems": 50})
    assert check(spec, library, 101)
    with pytest.raises(GrammarError, match="at least 101 characters"):
        check(spec, library, 100)


def test_nothing_but_control_tokens_matches() -> None:
    """A vocabulary in which the text cannot be written."""
    library = GrammarVocabulary.of({0: b"a", 1: b"b", 2: b""}, [2], [2], 3).to_library()
    with pytest.raises(GrammarError, match="no text of this vocabulary"):
        check(GrammarSpec.choice(["ac"]), library, MANY)
    assert check(GrammarSpec.choice(["ac", "ab"]), library, MANY)


def test_building_raises_what_the_library_says(library: LLTokenizer) -> None:
    with pytest.raises(GrammarError, match="no start rule found"):
        build('other: "a"', library)


def test_deep_schemas(library: LLTokenizer) -> None:
    def nested(depth: int) -> GrammarSpec:
        schema: dict[str, Any] = {"type": "integer"}
        for _ in range(depth):
            schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
        return GrammarSpec.json_schema(schema)

    assert check(nested(120), library, MANY)
    assert matches(build(nested(120).source(), library), "[" * 120 + "7" + "]" * 120)
    for depth in (130, 190):
        with pytest.raises(GrammarError, match="recursion limit exceeded"):
            check(nested(depth), library, MANY)


def test_a_known_hole(library: LLTokenizer) -> None:
    """llguidance takes an excluded bound that is whole when both bounds are within one. Should this fail, say so in the
    docs and let tests/random_schemas.py make such bounds again.
    """
    spec = GrammarSpec.json_schema({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1})
    assert matches(build(spec.source(), library), "-1")
    spec = GrammarSpec.json_schema({"type": "number", "minimum": -2.5, "exclusiveMaximum": -1})
    assert not matches(build(spec.source(), library), "-1")


def test_a_schema_of_junk_is_refused_and_nothing_else(library: LLTokenizer) -> None:
    for text in ('{"properties": 5}', '{"required": 5}', '{"items": 5}', '{"anyOf": 5}', '{"$ref": 5}', '{"type": 5}'):
        with pytest.raises(GrammarError):
            check(GrammarSpec.json_schema(json.loads(text)), library, MANY)


def test_an_end_that_is_ordinary_text() -> None:
    """Some checkpoints end with a token that is no control token."""
    library = GrammarVocabulary.of({0: b"a", 1: b"b", 2: b"\n"}, [], [2], 3).to_library()
    matcher = build(GrammarSpec.regex("a+").source(), library)
    assert allowed(matcher, 3) == {0}
    matcher.consume(0)
    assert allowed(matcher, 3) == {0, 2}
    assert matcher.end_ids == (2,)


def test_ends_are_told(library: LLTokenizer) -> None:
    assert build('start: "a"', library).end_ids == ENDS
