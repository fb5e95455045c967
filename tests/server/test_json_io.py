"""The parser of request bodies, beside what test_bad_requests.py sends through HTTP."""

from __future__ import annotations

import json
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.json_io import NotFiniteError, dump, parse

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES)
def test_it_agrees_with_the_standard_library_on_what_is_good(value: object) -> None:
    assert parse(json.dumps(value).encode()) == value
    assert json.loads(dump(value)) == value


@given(st.binary(max_size=50) | st.text(alphabet='[]{}":,\\u0dDeE+-.1 ', max_size=30).map(str.encode))
def test_whatever_comes_is_a_value_or_a_value_error(body: bytes) -> None:
    with suppress(ValueError):
        assert json.loads(body) == parse(body)


@pytest.mark.parametrize("body", [b"1e308", b'"1e999"', b"1e-999", b"0." + b"1" * 400, b'{"a": "' + b"9" * 500 + b'"}'])
def test_what_only_looks_like_an_overflow(body: bytes) -> None:
    assert parse(body) == json.loads(body)


@pytest.mark.parametrize("body", [b"1e309", b"-1e309", b'{"a":[{"b":1E+400}]}', b"9" * 400 + b".5", b"[1e99999999999]"])
def test_overflows(body: bytes) -> None:
    with pytest.raises(NotFiniteError, match="range"):
        parse(body)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"a": 1, "b": NaN}', "b"),
        (b'{"a": "NaN", "b": {"c": [1, -Infinity]}}', "b"),
        (b'{"a": 1e999, "b": NaN}', "a"),
        (b"[NaN]", None),
        (b"Infinity", None),
        (b'{"": NaN}', None),
        (b'{"two words": NaN}', None),
        (b'{"a\\nb": NaN}', None),
        (b'{"' + b"a" * 65 + b'": NaN}', None),
    ],
)
def test_what_is_no_number_has_a_place(body: bytes, field: str | None) -> None:
    with pytest.raises(NotFiniteError) as error:
        parse(body)
    assert error.value.field == field


@pytest.mark.parametrize("body", [b'"NaN"', b'{"Infinity": "-Infinity"}', b'["NaN", 1e300]'])
def test_words_that_are_no_numbers(body: bytes) -> None:
    assert parse(body) == json.loads(body)


def test_large_bodies_are_quick() -> None:
    start = time.perf_counter()
    parse(json.dumps({"prompt": list(range(300_000)), "x": "9" * 400}).encode())
    assert time.perf_counter() - start < 1


def test_what_is_no_number_is_null() -> None:
    assert dump([float("nan"), float("inf"), 1.5]) == b"[null,null,1.5]"
