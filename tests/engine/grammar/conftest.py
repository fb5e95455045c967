"""One vocabulary for the whole folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.engine.grammar.texts import byte_vocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer


@pytest.fixture(scope="session")
def library() -> LLTokenizer:
    """Of bytes."""
    return byte_vocabulary().to_library()
