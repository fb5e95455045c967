"""Events from parts, wherever they are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.bench.events import EventReader

BODY = (
    b': ping\n\ndata: {"a": 1}\n\nevent: x\ndata:{"b": "\xc3\xa9"}\n\n\n\nid: 7\r\ndata: c\r\n\r\ndata: d\ndata: e\n\n'
    b"data: [DONE]\n\ndata: cut"
)
EVENTS = [b'{"a": 1}', b'{"b": "\xc3\xa9"}', b"c", b"d\ne", b"[DONE]"]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 1000])
def test_parts_of_one_size(size: int) -> None:
    reader = EventReader()
    found = [event for start in range(0, len(BODY), size) for event in reader.feed(BODY[start : start + size])]
    assert found == EVENTS


@given(st.lists(st.integers(0, len(BODY)), max_size=8))
def test_parts_cut_anywhere(cuts: list[int]) -> None:
    reader, places = EventReader(), [0, *sorted(cuts), len(BODY)]
    found = [event for start, end in pairwise(places) for event in reader.feed(BODY[start:end])]
    assert found == EVENTS


def test_an_event_is_given_as_soon_as_it_is_whole() -> None:
    reader = EventReader()
    assert reader.feed(b"data: a\n") == []
    assert reader.feed(b"\ndata: b") == [b"a"]
    assert reader.feed(b"\r\n\r") == []
    assert reader.feed(b"\n") == [b"b"]
