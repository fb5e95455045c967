"""Tests with every outcome, for tests/test_interpreter.py. Nobody collects this file who does not name it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

pytestmark = pytest.mark.interpreter


@pytest.fixture
def broken() -> None:
    raise ValueError("broken fixture")


@pytest.fixture
def broken_at_the_end() -> Iterator[None]:
    yield
    raise ValueError("broken afterwards")


@pytest.mark.parametrize("text", ["a b", "c\nd", "é"])
def test_passes(text: str) -> None:
    del text
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_fails() -> None:
    print("printed before")
    assert 1 + 1 == 3


def test_is_skipped() -> None:
    pytest.skip("for a reason")


def test_breaks_before(broken: None) -> None:
    del broken


def test_breaks_after(broken_at_the_end: None) -> None:
    del broken_at_the_end


@pytest.mark.slow
def test_is_slow() -> None:
    raise AssertionError("it was deselected")
