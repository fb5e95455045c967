"""The parts of the card script about kernels, at tiny size in Triton's interpreter."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.backends.cuda.launch import Launch
from engine.backends.cuda.rows import rms_norm_launch
from engine.backends.cuda.tiles import TileTable, read_table, table_path
from tests.bench.card import checks, kernels, report
from tests.bench.card.main import main

pytestmark = pytest.mark.interpreter


def run(folder: Path, part: str) -> tuple[int, dict[str, Any]]:
    status = main(["--out", str(folder), "--tiny", "--device", "cpu", "--part", part])
    found: dict[str, Any] = json.loads((folder / "card.json").read_text())["parts"][part]
    return status, found


def test_every_kernel_is_checked_and_timed(tmp_path: Path) -> None:
    status, found = run(tmp_path, "kernels")
    assert status == 0, found["error"]
    kinds = {row["kernel"].split()[0] for row in found["checks"]}
    assert kinds == {"norm", "add", "rotary", "write", "attention", "route", "experts"}
    assert all(row["error"] <= row["tolerance"] for row in found["checks"])
    experts = {(row["weights"], row["routing"], row["rows"]) for row in found["experts"]}
    weights = ("float32", "float8_e4m3fn", "int8")
    assert experts == {
        (name, pattern, rows) for name in weights for pattern in ("even", "zipf", "one") for rows in (1, 7)
    }
    rates = ("us", "tb_per_s", "percent_of_copy", "tflops", "percent_of_matmul")
    for row in (*found["experts"], *found["attention"]):
        assert all(row[rate] > 0 for rate in rates), row
    assert all(row["distinct"] == 2 for row in found["experts"] if row["routing"] == "one")
    assert {(row["cache"], row["batch"], row["queries"], row["context"]) for row in found["attention"]} == {
        (cache, *sizes)
        for cache in ("float32", "float8_e4m3fn")
        for sizes in ((1, 1, 5), (3, 1, 5), (1, 1, 40), (3, 1, 40), (1, 7, 20))
    }
    assert len(found["route"]) == len(found["rows"]) == 2
    assert found["copy_tb_per_s"] > 0


def test_a_kernel_that_computes_something_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(x: torch.Tensor, weight: torch.Tensor, eps: float, normed: torch.Tensor, **options: Any) -> Launch:
        return rms_norm_launch(x, weight, eps + 0.1, normed, **options)

    monkeypatch.setattr(checks, "rms_norm_launch", other)
    monkeypatch.setattr(report, "PART_SECONDS", 0.0)  # the checks that are left will do
    monkeypatch.setattr(kernels, "row_times", lambda _: None)
    status, found = run(tmp_path, "kernels")
    assert status == 1
    assert "norm of rows torch.float32 33: error" in found["error"]
    assert "add and norm" not in found["error"]
    assert len(found["left_out"]) > 20
    assert "experts" not in found


def test_rows_that_are_there_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run without time has left out, the next one measures; then there is nothing to do."""
    arguments = ["--out", str(tmp_path), "--tiny", "--device", "cpu", "--part", "kernels", "--resume"]

    def rows() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / "card.json").read_text())["parts"]["kernels"]
        return {name: found[name] for name in ("checks", "experts", "attention", "route", "rows") if name in found}

    monkeypatch.setattr(kernels, "attention_times", lambda _: None)
    monkeypatch.setattr(kernels, "checks", lambda _: None)
    assert main(arguments) == 0
    before = rows()
    assert len(before["experts"]) == 18
    own = json.loads((tmp_path / "card.json").read_text())
    own["parts"]["kernels"] |= {"complete": False, "experts": before["experts"][:-2], "route": []}
    (tmp_path / "card.json").write_text(json.dumps(own))
    assert main(arguments) == 0
    after = rows()
    assert after["experts"][:-2] == before["experts"][:-2], "kept, with their times"
    assert [len(after[name]) for name in ("experts", "route", "rows")] == [18, 2, 2]


def test_tiles_are_measured_and_written(tmp_path: Path) -> None:
    before = table_path().read_text()
    status, found = run(tmp_path, "tune")
    assert status == 0, found["error"]
    assert table_path().read_text() == before, "tiny sizes are no measure"
    old, new = ({entry.key: entry for entry in read_table(path)} for path in (table_path(), tmp_path / "tiles.txt"))
    tuned = {("sm_90", bits, rows) for bits in (16, 8) for rows in (1, 7)}
    assert new.keys() == old.keys() | tuned
    assert all(entry.source == ("interpreter" if key in tuned else old[key].source) for key, entry in new.items())
    times: dict[tuple[int, str, int, str], list[tuple[float, str]]] = {}
    for row in found["tiles"]:
        key = row["rows"], row["weights"], row["block_m"], row["kernel"]
        times.setdefault(key, []).append((row["us"], row["tile"]))
    assert min(len(measured) for measured in times.values()) > 3
    for bits, weights in ((16, "float32"), (8, "float8_e4m3fn")):
        for rows in (1, 7):
            line = new["sm_90", bits, rows]
            for kernel, tile in (("up", line.up), ("down", line.down)):
                assert min(times[rows, weights, line.block_m, kernel])[1] == str(tile)


def test_a_line_keeps_its_tiles_where_there_is_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.bench.card.tune.PART_SECONDS", 0.0)
    status, found = run(tmp_path, "tune")
    assert status == 0, found["error"]
    assert len(found["tiles"]) == 2 * 4
    table = TileTable.load(
        capability=(9, 0), dtype=torch.float32, weight_dtype=torch.int8, hidden_size=64, intermediate_size=96
    )
    new = {entry.key: entry for entry in read_table(tmp_path / "tiles.txt")}
    for rows in (1, 7):
        old = table.choose(rows)
        assert new["sm_90", 8, rows] == replace(old, rows=rows, source="interpreter")
