"""Real servers, started once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.running import Server, running_server
from tests.tiny import write_tiny_mixtral
from tests.tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 260 byte tokens and a context of 2,048."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_mixtral(folder, vocab_size=VOCAB_SIZE, max_position_embeddings=2048, eos_token_ids=(257,), seed=1)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_server(tiny_checkpoint: Path) -> Iterator[Server]:
    with running_server(str(tiny_checkpoint), "--served-model-name", "tiny", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="module")
def demo_server(demo_checkpoint: Path) -> Iterator[Server]:
    """The demo model in float32, as the golden answers were computed."""
    del demo_checkpoint  # built, so that start-up is short
    with running_server("--dtype", "float32", "--max-model-len", "2048") as server:
        yield server
