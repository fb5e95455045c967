"""Checkpoints that tests of routing share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.routing.handmade import write_handmade
from tests.tiny import write_tiny_mixtral


@pytest.fixture(scope="session")
def handmade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handmade")
    write_handmade(folder)
    return folder


@pytest.fixture(scope="session")
def five_experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights: 97 token ids, two layers, top-2 of five experts."""
    folder = tmp_path_factory.mktemp("five")
    write_tiny_mixtral(folder, vocab_size=97, num_experts=5, max_position_embeddings=8192, seed=8)
    return folder
