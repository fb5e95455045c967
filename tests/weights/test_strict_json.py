from __future__ import annotations

import pytest

from weights.strict_json import parse_object


def test_an_object() -> None:
    assert parse_object(' {"a": [1, 2.5, null], "é": {}} '.encode()) == {"a": [1, 2.5, None], "é": {}}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "malformed JSON"),
        (b'{"a": 1', "malformed JSON"),
        (b'{"a": 1} x', "malformed JSON"),
        (b"[]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e400}', "too large"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "'b' appears twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "integer"),
    ],
)
def test_anything_else_is_refused_in_one_line(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_object(data)
    assert "\n" not in str(caught.value)
