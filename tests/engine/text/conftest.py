from pathlib import Path

import pytest

from engine.text import Tokenizer
from tests.engine.text.checkpoints import CHATML, MIXTRAL, byte_level, sentencepiece


@pytest.fixture(scope="session")
def mixtral() -> Tokenizer:
    return Tokenizer.load(MIXTRAL)


@pytest.fixture(scope="session")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level, with a ChatML template."""
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("chatml"), chat_template=CHATML))


@pytest.fixture(scope="session")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """SentencePiece-like."""
    return Tokenizer.load(sentencepiece(tmp_path_factory.mktemp("pieces")))


@pytest.fixture(params=["chatml", "pieces", "mixtral"])
def any_kind(request: pytest.FixtureRequest) -> Tokenizer:
    tokenizer = request.getfixturevalue(request.param)
    assert isinstance(tokenizer, Tokenizer)
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A byte-level checkpoint to break."""
    return byte_level(tmp_path / "checkpoint", chat_template=CHATML)
