"""The measurement of grammars works, with a tiny vocabulary."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.bench import mask_cost
from tests.tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_byte_tokenizer(tmp_path)
    out = tmp_path / "out.json"
    arguments = [str(tmp_path), "--schemas", "12", "--walks", "2", "--tokens", "40", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["mask_cost", *arguments])
    mask_cost.main()
    figures = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == figures
    assert (figures["vocabulary"], figures["schemas"]) == (VOCAB_SIZE, 12)
    times = [figures["build_us"], figures["token_us"], figures["token_processor_us"]]
    times += [figures["step_us"][batch][part] for batch in ("1", "32") for part in ("fill", "apply")]
    for row in times:
        assert 0 < row["median"] <= row["p99"] <= row["max"]
    assert [row["count"] for row in times[:1] + times[3:]] == [12, *[100] * 4]
    assert 24 <= figures["token_us"]["count"] <= 24 * 40
    assert figures["token_us"]["median"] < 100_000, "microseconds"
