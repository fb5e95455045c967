"""Upcycling, beside the files it writes (tests/weights/test_upcycle.py) and what they compute (tests/parity)."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import upcycling
from engine.upcycling import upcycle
from tests.tiny import TINY_LLAMA, write_tiny_mixtral
from weights.errors import CheckpointError


def test_a_folder_that_is_not_empty_is_refused_before_the_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny_mixtral(tmp_path / "dense", TINY_LLAMA)
    monkeypatch.delattr(upcycling, "load")
    with pytest.raises(CheckpointError, match="dense: is there already"):
        upcycle(str(tmp_path / "dense"), tmp_path / "dense", num_experts=2, noise=0.0, seed=0)
