"""The token budget, against KERNELS' figures and the arithmetic of a roofline."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.step_tokens import ROOFLINES, Roofline, compute_bound_tokens, default_step_tokens
from tests.engine.test_plan import MIXTRAL_8X7B

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


@pytest.mark.parametrize(("card", "published"), [(H100, 1070), (H200, 735)])
def test_the_experts_of_mixtral_8x7b_turn_compute_bound_where_it_was_worked_out(card: str, published: int) -> None:
    assert compute_bound_tokens(MIXTRAL_8X7B, ROOFLINES[card], None) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize("quantization", [None, "fp8", "int8"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 6), (16, 1)])
def test_reading_and_multiplying_take_equally_long_there(
    num_experts: int, top_k: int, quantization: str | None
) -> None:
    config = replace(MIXTRAL_8X7B, num_experts=num_experts, num_experts_per_tok=top_k)
    card = Roofline(1e15, 2e12)
    tokens = compute_bound_tokens(config, card, quantization)
    params = 3 * 4096 * 14336
    num_bytes = num_experts * params * {None: 2, "fp8": 1, "int8": 1}[quantization]
    operations = tokens * top_k * 2 * params
    flops = card.flops * (2 if quantization == "fp8" else 1)
    assert operations / flops == pytest.approx(num_bytes / card.bandwidth)


@pytest.mark.parametrize(
    ("card", "quantization", "tokens"),
    [
        (H100, None, 1152),
        (H100, "fp8", 1152),
        (H100, "int8", 640),
        (H200, None, 768),
        (H200, "int8", 384),
        ("NVIDIA A100-SXM4-80GB", None, 2048),
        (None, "fp8", 2048),
    ],
)
def test_the_budget_of_mixtral_8x7b(card: str | None, quantization: str | None, tokens: int) -> None:
    assert default_step_tokens(MIXTRAL_8X7B, device="cuda", card=card, quantization=quantization) == tokens
    assert default_step_tokens(MIXTRAL_8X7B, device="cpu", card=card, quantization=quantization) == 160


def test_its_limits() -> None:
    dense = replace(MIXTRAL_8X7B, num_experts_per_tok=8)
    assert default_step_tokens(dense, device="cuda", card=H200, quantization="int8") == 256
    sparse = replace(MIXTRAL_8X7B, num_experts=256, num_experts_per_tok=1)
    assert default_step_tokens(sparse, device="cuda", card=H100) == 8192
    assert default_step_tokens(MIXTRAL_8X7B, device="cuda", card=H200, max_num_seqs=1000) == 1000
