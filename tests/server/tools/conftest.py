"""A tokenizer and a format of each kind."""

from __future__ import annotations

import pytest

from engine.text import Tokenizer
from server.tools.formats import CallFormat, call_format
from tests.server.tools.kinds import KINDS, tokenizer_of


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    return {kind: tokenizer_of(kind, tmp_path_factory.mktemp("tools")) for kind in (*KINDS, "none")}


@pytest.fixture(scope="session")
def formats(tokenizers: dict[str, Tokenizer]) -> dict[str, CallFormat]:
    return {kind: call_format("auto", tokenizer) for kind, tokenizer in tokenizers.items()}
