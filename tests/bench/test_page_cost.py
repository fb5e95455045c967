"""The measurement of open pages works, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import page_cost
from tests.tiny import write_tiny_mixtral
from tests.tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_mixtral(tmp_path, vocab_size=VOCAB_SIZE, max_position_embeddings=1024)
    write_byte_tokenizer(tmp_path)
    out = tmp_path / "out.json"
    options = ["--batch", "3", "--pages", "2", "--steps", "400", "--rounds", "2", "--json", str(out)]
    page_cost.main([*options, "--", str(tmp_path)])
    figures = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == figures
    assert (figures["batch"], figures["pages"], figures["rounds"]) == (3, 2, 2)
    assert 0 < figures["without_ms"] < 1000
    assert figures["with_ms"] / figures["without_ms"] == pytest.approx(figures["with_over_without"], rel=0.5)
    assert figures["page_events"] >= 2 * 2, "the first comes at once"
