"""Parts decode and shapes of the card script at tiny size, and the arithmetic of the roofline."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.core import EngineCore
from engine.plan import plan_model
from engine.types import MemoryUse
from tests.bench.card import decode, engines, report, shapes
from tests.bench.card.engines import Variant, formats
from tests.bench.card.main import main
from tests.bench.card.models import MIXTRAL_8X7B, TINY
from tests.bench.card.report import Report, Setting
from tests.bench.card.roofline import StepBytes, step_bytes
from tests.bench.card.shapes import Rates, Shape, requests_in
from weights.config import ModelConfig


def run(folder: Path, part: str, *options: str) -> dict[str, Any]:
    assert main(["--out", str(folder), "--tiny", "--device", "cpu", "--part", part, *options]) == 0
    found: dict[str, Any] = json.loads((folder / "card.json").read_text())["parts"][part]
    return found


def bytes_of(
    config: ModelConfig, quantization: str | None = None, *, hits: float = 0.0, positions: float = 0.0
) -> StepBytes:
    plan = plan_model(config, quantization=quantization, memory_bytes=1 << 40)
    weights = {str(kind): size for kind, size in plan.weight_bytes_by_kind.items()}
    return step_bytes(
        MemoryUse(weights=weights, kv_cache=1000 * plan.kv_bytes_per_token),
        num_experts=config.num_layers * config.num_experts,
        kv_tokens=1000,
        hits=hits,
        positions=positions,
    )


@pytest.mark.parametrize(
    ("batch", "gigabytes"), [(1, 25.6), (8, 85.2), (32, 97.4), (64, 101.7), (128, 110.3), (256, 127.5)]
)
def test_bytes_are_those_that_were_counted_by_hand(batch: int, gigabytes: float) -> None:
    """Of a step of Mixtral 8x7B in bfloat16 at a context of 1,024 with 8(1 - 0.75^B) experts in each of 32 layers."""
    hits = 32 * 8 * (1 - 0.75**batch)
    found = bytes_of(MIXTRAL_8X7B, hits=hits, positions=batch * 1024)
    assert found.total / 1e9 == pytest.approx(gigabytes, rel=0.003)


def test_weights_of_8_bits_halve_the_experts_alone() -> None:
    whole, half = (bytes_of(MIXTRAL_8X7B, name, hits=64) for name in (None, "fp8"))
    assert half.experts == pytest.approx(whole.experts / 2, rel=0.001)  # and the scales
    assert half.dense == whole.dense


def test_a_tied_projection_reads_the_embedding() -> None:
    assert bytes_of(replace(MIXTRAL_8X7B, tie_word_embeddings=True)).dense == bytes_of(MIXTRAL_8X7B).dense


def test_decode(tmp_path: Path) -> None:
    found = run(tmp_path, "decode")
    rows = found["batches"]
    assert [(row["routing"], row["batch"]) for row in rows] == [("even", 1), ("even", 3), ("free", 1), ("free", 3)]
    # Three tokens take experts 0 and 1, 2 and 3, 4 and 5.
    assert [row["distinct_experts"] for row in rows[:2]] == [2.0, 6.0]
    assert rows[2]["distinct_experts"] == 2.0
    assert 2.0 <= rows[3]["distinct_experts"] <= 6.0
    expert_bytes = 3 * TINY.hidden_size * TINY.intermediate_size * 4
    position_bytes = 2 * TINY.num_layers * TINY.num_kv_heads * TINY.head_dim * 4
    for row in rows:
        assert row["expert_gb"] * 1e9 == pytest.approx(row["distinct_experts"] * TINY.num_layers * expert_bytes)
        assert row["kv_gb"] * 1e9 == pytest.approx(row["context"] * row["batch"] * position_bytes)
        assert row["gb"] == pytest.approx(row["expert_gb"] + row["dense_gb"] + row["kv_gb"])
        assert row["tok_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
        assert row["tb_per_s"] == pytest.approx(row["gb"] / row["step_ms"])
        assert row["percent_of_roofline"] == pytest.approx(100 * row["tb_per_s"] / found["copy_tb_per_s"])
    # Prompts of 8 tokens; 3 tokens were made before the 8 steps that are timed.
    assert rows[0]["context"] == 8 + 3 + 8 / 2
    assert [row["routing"] for row in found["prefill"]] == ["even", "free"]
    assert all(row["tok_s"] > 0 for row in found["prefill"])
    assert [(row["num_layers"], row["kv_tokens"]) for row in found["models"]] == [(2, 2048)] * 2
    assert all(0.5 < row["measured_over_predicted"] < 2 for row in found["models"])
    assert found["complete"]


def test_nothing_is_used_for_the_first_time_while_it_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second step after new requests takes half a second, as if it compiled: no time shows it."""
    slow: list[float] = []
    original_step, original_add = EngineCore.step, EngineCore.add

    def step(core: EngineCore) -> Any:
        if slow:
            time.sleep(slow.pop())
        return original_step(core)

    def add(core: EngineCore, request: Any) -> None:
        slow[:] = [0.5, 0.0]  # taken from its end
        original_add(core, request)

    monkeypatch.setattr(EngineCore, "step", step)
    monkeypatch.setattr(EngineCore, "add", add)
    found = run(tmp_path, "decode")
    assert all(row["step_ms"] < 50 for row in found["batches"])


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Variant] = []
    original = engines.build

    def build(setting: Setting, config: ModelConfig, variant: Variant, **options: int) -> EngineCore:
        built.append(variant)
        if len(built) == 2:
            monkeypatch.setattr(report, "PART_SECONDS", 0.0)  # in the middle of the second model
        return original(setting, config, variant, **options)

    monkeypatch.setattr(decode, "build", build)
    first = run(tmp_path, "decode")
    assert [row["routing"] for row in first["batches"]] == ["even", "even"]
    assert len(first["left_out"]) == 2
    assert not first["complete"]
    monkeypatch.setattr(report, "PART_SECONDS", 400.0)
    second = run(tmp_path, "decode", "--resume")
    assert [variant.routing for variant in built] == ["even", "free", "free"]
    assert second["batches"][:2] == first["batches"]
    assert [row["routing"] for row in second["batches"]] == ["even", "even", "free", "free"]
    assert len(second["models"]) == 2
    assert second["complete"]
    assert "left_out" not in second


def test_batches_beyond_the_cache_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "TINY_SIZES", replace(decode.TINY_SIZES, batches=(1, 100)))
    found = run(tmp_path, "decode")
    assert [row["batch"] for row in found["batches"]] == [1, 1]
    assert "batch 100: 4800 tokens of KV cache, where there are 2048" in found["left_out"][0]
    assert found["complete"], "another run finds no more room"


def test_shapes(tmp_path: Path) -> None:
    found = run(tmp_path, "shapes")
    rows = found["shapes"]
    assert [(row["input_len"], row["output_len"], row["requests"]) for row in rows] == [(8, 8, 6), (24, 4, 5)]
    for row in rows:
        assert row["all_answered"]
        assert row["requests_planned"] == row["requests"]
        assert row["output_tok_s"] == pytest.approx(row["requests"] * row["output_len"] / row["seconds"])
        assert row["total_tok_s"] / row["output_tok_s"] == pytest.approx(1 + row["input_len"] / row["output_len"])
        assert 2 <= row["distinct_experts"] <= 6
    assert found["complete"]


def test_what_takes_too_long_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHARE_SECONDS", 0.0)
    monkeypatch.setattr(shapes, "requests_in", lambda _seconds, shape, _rates: shape.requests)
    rows = run(tmp_path, "shapes")["shapes"]
    assert [row["all_answered"] for row in rows] == [False, False]
    assert all(row["output_tok_s"] * row["seconds"] < row["requests"] * row["output_len"] for row in rows)


def test_requests_are_as_many_as_there_is_time_for() -> None:
    rates = Rates(prefill=1000.0, decode=100.0)
    shape = Shape(1000, 100, 30)  # two seconds a request
    assert requests_in(100.0, shape, rates) == 30
    assert requests_in(31.0, shape, rates) == 15
    assert requests_in(0.1, shape, rates) == 1


def test_formats_are_those_that_a_card_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(torch.device("cuda"), tiny=False, out=Path())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert formats(setting) == [("fp8", "fp8"), ("fp8", "auto"), (None, "auto")]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert formats(setting) == [("fp8", "auto"), (None, "auto")]


@pytest.mark.parametrize(("gigabytes", "fits"), [(85, False), (150, True)])
def test_16_bits_run_whole_or_not_at_all(
    gigabytes: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (gigabytes * 10**9, gigabytes * 10**9))
    setting = Setting(torch.device("cuda"), tiny=False, out=tmp_path)
    found = Report(tmp_path / "card.json", {})
    part = found.part("decode")
    config = engines.config_of(setting, part, Variant(None, "auto", "even"), decode.LEAST_TOKENS)
    assert config == (MIXTRAL_8X7B if fits else None)
    assert engines.config_of(setting, part, Variant("fp8", "auto", "even"), decode.LEAST_TOKENS) == MIXTRAL_8X7B
    part.end()
    left_out = json.loads((tmp_path / "card.json").read_text())["parts"]["decode"].get("left_out", [])
    assert len(left_out) == (0 if fits else 1)
    assert all("of 32 layers fit" in line for line in left_out)
