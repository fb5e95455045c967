import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tools.scanner import JsonScanner, NotJsonError

TEXTS = st.text(st.characters(exclude_characters=[chr(code) for code in range(0xFDD0, 0xFDF0)]), max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, VALUES, max_size=3)
FRAGMENTS = st.lists(
    st.sampled_from([*'{}[],:"\\ -+.eE0123', "true", "nul", "l", '"a"', '"a":', "\\u00e9", "\\x", "\n", "\t", "é"]),
    max_size=12,
).map("".join)


def scan(text: str) -> int | None:
    """Where the value ends; None when it does not, or is none."""
    scanner = JsonScanner()
    for position, char in enumerate(text, start=1):
        try:
            scanner.feed(char)
        except NotJsonError:
            return None
        if scanner.complete:
            return position
    return None


def is_json(text: str) -> bool:
    try:
        json.loads(text, parse_constant=lambda name: int(name))
    except ValueError:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(value=OBJECTS, indent=st.sampled_from([None, 0, 3]), ascii_only=st.booleans())
def test_json_ends_where_it_ends(value: dict[str, object], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert scan(text) == len(text)
    assert scan(text + "}") == len(text)
    assert scan(text[:-1]) is None


@settings(max_examples=1000, deadline=None)
@given(inner=FRAGMENTS)
def test_what_the_standard_parser_says(inner: str) -> None:
    text = "{" + inner + "}"
    end = scan(text)
    assert (end == len(text)) == is_json(text)
    assert end is None or is_json(text[:end])


@pytest.mark.parametrize(
    "text",
    [
        '{"a":01}', '{"a":-}', '{"a":1.}', '{"a":.5}', '{"a":1e}', '{"a":+1}', '{"a":1-2}', '{"a":NaN}', '{"a":nulll}',
        '{"a":nul}', '{"a":TRUE}', '{"a" 1}', '{"a":1 2}', '{"a":1,}', '{,}', "{1:2}", '{"a":[1,]}', '{"a":[,]}',
        '{"a":}', '{"a":1]', '{"a":[1}', '{"a":"\n"}', '{"a":"\\q"}', '{"a":"\\u12g4"}', "{'a':1}", "{a:1}",
        '{"a":\u00a01}',
        '{"a":"\ufdd0"}', '{"a":\ufdd0}', '{"a":١}', " {}", "5", "true", "]", "",
    ],
)  # fmt: skip
def test_what_is_no_json(text: str) -> None:
    assert scan(text) is None


def test_a_list_and_a_string() -> None:
    assert scan("[1, 2.5e-3, -0]") == 15
    assert scan('"a\\"b"c') == 6


def test_depth_takes_no_stack() -> None:
    text = '{"a":' + "[" * 100_000 + "]" * 100_000 + "}"
    assert scan(text) == len(text)
