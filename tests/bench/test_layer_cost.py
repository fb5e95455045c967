"""The measurement of the HTTP layer works, and what it measures is far from getting out of hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import layer_cost

ROOT = Path(__file__).parents[2]
CASES = ("chat", "completions, 5 logprobs")


def test_cost_of_a_token(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cost.json"
    cases = [word for case in CASES for word in ("--case", case)]
    layer_cost.main(["--seconds", "2", "--repeat", "1", "--where", "--json", str(path), *cases])
    shown = capsys.readouterr().out
    rows = json.loads(path.read_text())
    assert list(rows) == list(CASES)
    for case, row in rows.items():
        # The target is 100, and here it is some 40. But the machine may be slow, and other tests run beside this one.
        assert 1 < row["microseconds"] < 200
        assert 0.3 < row["events_a_token"] < 1.1
        assert list(row["where"]) == [name for name, _ in layer_cost.PARTS]
        assert sum(row["where"].values()) > 1
        assert f"\n{case} " in shown
    assert json.loads(shown.splitlines()[-1]) == rows


def test_a_stream_that_ends_is_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    load = layer_cost.Load(streams=2, rate=200, seconds=5)
    monkeypatch.setitem(layer_cost.CASES, "short", (layer_cost.COMPLETIONS, {"prompt": "Hi", "max_tokens": 40}))
    with (
        layer_cost.running_server(load.streams / load.rate) as server,
        pytest.raises(AssertionError, match="ended a stream"),
    ):
        layer_cost.measure(server, "short", load)


def test_parts_are_there() -> None:
    pieces = [piece for _, pieces in layer_cost.PARTS for piece in pieces if piece.startswith(("engine/", "server/"))]
    assert pieces
    assert [piece for piece in pieces if not (ROOT / piece).exists()] == []
