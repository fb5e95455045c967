"""Whether a schema has an end, and how soon."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from engine.grammar.schema import shortest
from tests.random_schemas import random_schema

INTEGER = {"type": "integer"}
NULL = {"type": "null"}
ITSELF = {"$ref": "#"}


def node(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*properties]}


def defined(root: str, **schemas: Any) -> dict[str, Any]:
    return {"$defs": schemas, "$ref": f"#/$defs/{root}"}


def to(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


ENDLESS: dict[str, Any] = {
    "itself": ITSELF,
    "a list": node(next=ITSELF),
    "a list of lists": {"type": "array", "items": ITSELF, "minItems": 1},
    "in a definition": defined("a", a=node(n=to("a"))),
    "through each other": defined("a", a=node(n=to("b")), b=node(n=to("c")), c=node(n=to("a"))),
    "one of two needs both": defined("a", a={"allOf": [to("b"), INTEGER]}, b=node(n=to("a"))),
    "either way": defined("a", a={"anyOf": [node(n=to("a")), node(m=to("b"))]}, b={"oneOf": [node(n=to("a"))]}),
    "in a tuple": {"type": "array", "prefixItems": [INTEGER, ITSELF], "minItems": 2},
    "a cycle of names": defined("a", a=to("b"), b=to("a")),
    "only in one part": node(good=INTEGER, bad=defined("a")) | {"$defs": {"a": node(n=to("a"))}},
    "of two types": {"type": ["object", "array"], "properties": {"a": ITSELF}, "required": ["a"], "minItems": 1}
    | {"items": ITSELF},
    "named with escapes": {"$defs": {"a/b ~%": node(n={"$ref": "#/$defs/a~1b%20~0%25"})}}
    | {"$ref": "#/$defs/a~1b%20~0%25"},
    "with an empty name": {"$defs": {"": node(n={"$ref": "#/$defs/"})}, "$ref": "#/$defs/"},
    "by its place in a list": {"anyOf": [node(n={"$ref": "#/anyOf/0"})]},
}


@pytest.mark.parametrize("schema", ENDLESS.values(), ids=ENDLESS)
def test_what_never_ends(schema: Any) -> None:
    assert shortest(schema) == math.inf


def chain(length: int, last: Any) -> dict[str, Any]:
    """a0 holds a1, which holds a2, and so on."""
    schemas = {f"a{i}": node(n=to(f"a{i + 1}")) for i in range(length)}
    return defined("a0", **schemas, **{f"a{length}": last})


SHORTEST: dict[str, tuple[Any, Any]] = {
    # an instance that is as short as can be
    "anything": ({}, 1),
    "true": (True, 1),
    "no type": ({"properties": {"a": ITSELF}, "required": ["a"]}, 1),
    "not required": ({"type": "object", "properties": {"next": ITSELF}}, {}),
    "an empty list": ({"type": "array", "items": ITSELF}, []),
    "an empty text": ({"type": "string"}, ""),
    "null in the end": (node(next={"anyOf": [ITSELF, NULL]}), {"next": 1}),
    "by type": ({"type": ["object", "null"], "properties": {"n": ITSELF}, "required": ["n"]}, 1),
    "two names": (node(ab=INTEGER, c={"type": "array"}), {"ab": 1, "c": []}),
    "a name that is not described": ({"type": "object", "required": ["abc", "abc"]}, {"abc": 1}),
    "three items": ({"type": "array", "items": {"type": "string", "minLength": 2}, "minItems": 3}, ["ab", "ab", "ab"]),
    "a tuple and more": (
        {"type": "array", "prefixItems": [{"type": "array"}, INTEGER], "items": node(k=INTEGER), "minItems": 3},
        [[], 1, {"k": 1}],
    ),
    "a tuple of which one is enough": ({"type": "array", "prefixItems": [INTEGER, ITSELF], "minItems": 1}, [1]),
    "all of": ({"allOf": [{"type": "string", "minLength": 3}, {"type": "string", "minLength": 5}]}, "12345"),
    "any of": ({"anyOf": [{"type": "string", "minLength": 3}, {"type": "array", "items": {}, "minItems": 2}]}, "123"),
    "a constant": ({"const": {"a": "long"}}, 1),
    "through each other": (defined("a", a=node(n=to("b")), b={"anyOf": [node(m=to("a")), NULL]}), {"n": 1}),
    "a name used twice": (defined("a", a=node(x=to("b"), y=to("b")), b={"type": "array"}), {"x": [], "y": []}),
    "an escaped name": (
        {"$defs": {"a/b ~%": {"type": "string", "minLength": 7}}, "$ref": "#/$defs/a~1b%20~0%25"},
        "1234567",
    ),
    "by its place in a list": ({"anyOf": [{"type": "string", "minLength": 7}, {"$ref": "#/anyOf/0"}]}, "1234567"),
    "a place that is none": ({"anyOf": [{"$ref": "#/anyOf/7"}]}, 1),
    "elsewhere": ({"$ref": "http://example.com/x.json"}, 1),
    "an anchor": ({"$defs": {"a": {"$anchor": "here", "type": "string", "minLength": 9}}, "$ref": "#here"}, 1),
}


@pytest.mark.parametrize(("schema", "instance"), SHORTEST.values(), ids=SHORTEST)
def test_the_shortest(schema: Any, instance: Any) -> None:
    assert shortest(schema) == len(json.dumps(instance, separators=(",", ":")))


@pytest.mark.parametrize("length", [1, 33, 64, 65, 500])
def test_references_in_a_row(length: int) -> None:
    assert shortest(chain(length, {"type": "string", "minLength": 10})) == 6 * length + 12
    assert shortest(chain(length, to("a0"))) == math.inf
    backwards = {f"a{i + 1}": node(n=to(f"a{i}")) for i in range(length)}
    assert shortest(defined(f"a{length}", a0=NULL, **backwards)) == 6 * length + 1


def test_a_way_out_that_is_found_late() -> None:
    """The long way is known first, then shorter and shorter ones."""
    schemas = {f"a{i}": {"anyOf": [node(long_name=to(f"a{i + 1}")), to(f"b{i}")]} for i in range(50)}
    outs = {f"b{i}": {"type": "string", "minLength": 1000 - i} for i in range(51)}
    assert shortest(defined("a0", **schemas, **outs, a50=to("b50"))) == 1002


def test_many_items() -> None:
    assert shortest({"type": "array", "items": INTEGER, "minItems": 10**9}) == 2 * 10**9 + 1
    assert shortest({"type": "array", "items": {"type": "array", "minItems": 10**9}, "minItems": 10**9}) > 10**18
    for count in (10**400, 1e300, math.inf):
        for schema in ({"type": "array", "minItems": count}, {"type": "string", "minLength": count}):
            assert 10**15 <= shortest(schema) < math.inf
        assert shortest({"type": "array", "items": ITSELF, "minItems": count}) == math.inf


def test_a_type_named_twice_is_looked_at_once() -> None:
    """Otherwise a schema of 2 KB takes 2 to the power of 60 steps."""
    schema: dict[str, Any] = {}
    for _ in range(60):
        schema = {"type": ["object", "object"], "properties": {"a": schema}, "required": ["a"]}
    assert shortest(schema) == 6 * 60 + 1


KEYWORDS = (
    *("type", "properties", "required", "items", "prefixItems", "minItems", "minLength", "allOf", "anyOf", "oneOf"),
    *("$ref", "$defs", "const", "enum", "a", "0"),
)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYWORDS),
            inner
            | st.sampled_from(
                [
                    *("object", "array", "string", "#", "#/", "#/a", "#/a/0", "#/$defs/a", "#/%ff"),
                    *("#/a/" + "9" * 5000, ["object", None, {}, "array"], ["a", 5, None]),
                ]
            ),
        )
    ),
    max_leaves=30,
)


@given(JUNK)
def test_nothing_makes_it_raise(schema: Any) -> None:
    assert shortest(schema) >= 1


@pytest.mark.parametrize("seed", range(200))
def test_random_schemas_have_an_end(seed: int) -> None:
    found = random_schema(seed)
    Draft202012Validator.check_schema(found.schema)
    assert 1 <= shortest(found.schema) < 1000
