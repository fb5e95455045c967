"""Routing against transformers: the loss it balances experts with, and a K of its own for some rows of a batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from engine.routing.base import GateOutput
from engine.routing.record import RoutingRecord
from engine.routing.stats import pooled_loss, stats
from engine.routing.topk_softmax import TopKSoftmax
from engine.types import Steering
from tests.engine.routing.inputs import make_inputs
from tests.parity.configs import make
from tests.parity.paged import load_runner, paged_batch
from tests.parity.test_transformers import relative_error


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "top_k", "num_tokens"),
    [(3, 8, 2, 301), (1, 8, 1, 64), (2, 5, 3, 77), (4, 16, 4, 33), (2, 4, 4, 10), (1, 2, 2, 1), (2, 64, 8, 250)],
)
@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_the_pooled_loss_is_transformers(
    num_layers: int, num_experts: int, top_k: int, num_tokens: int, skew: float
) -> None:
    """Over traffic of several steps, through router and record."""
    generator = torch.Generator().manual_seed(num_tokens)
    logits = torch.randn(num_layers, num_tokens, num_experts, generator=generator)
    logits[..., 1] += skew
    record = RoutingRecord(
        num_layers=num_layers,
        num_experts=num_experts,
        top_k=top_k,
        max_tokens=num_tokens,
        device=torch.device("cpu"),
    )
    router = TopKSoftmax(num_experts, renormalize=True)
    for start in range(0, num_tokens, 60):
        rows = slice(start, min(start + 60, num_tokens))
        steerings = [None] * (rows.stop - rows.start)
        inputs = make_inputs(steerings, num_experts=num_experts, top_k=top_k, num_layers=num_layers)
        for layer in range(num_layers):
            record.write(layer, router(GateOutput(logits[layer, rows], None), layer, inputs))
        record.reduce(inputs)
    expected = float(load_balancing_loss_func(tuple(logits), num_experts, top_k))
    for sums in (record.total(), record.window()):
        assert pooled_loss(sums) == pytest.approx(expected, abs=1e-6, rel=1e-6)
        assert stats(sums).pooled_auxiliary_loss == pooled_loss(sums)


LENGTHS = [11, 1, 7, 19, 5, 13]
TOP_KS = [None, 1, 8, None, 1, 3]
CHUNKS: dict[str, Callable[[int], list[int]]] = {
    "one go": lambda length: [length],
    "chunks": lambda length: [4, 1, 6, 8] if length == 19 else [length],
    "token by token": lambda length: [1] * length,
}


@pytest.mark.parametrize("schedule", CHUNKS)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_a_k_of_its_own_is_transformers_with_that_k(backend: str, schedule: str, tmp_path: Path) -> None:
    """Requests with K = 1, 3 and 8 in a batch with plain ones, which get what they get from the plain model."""
    make("plain", tmp_path)
    models = {
        top_k: MixtralForCausalLM.from_pretrained(
            tmp_path, num_experts_per_tok=top_k, attn_implementation="eager", experts_implementation="eager"
        ).eval()
        for top_k in (1, 2, 3, 8)
    }
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 101, (length,), generator=generator).tolist() for length in LENGTHS]
    runner = load_runner(str(tmp_path), backend=backend)
    steerings = [None if top_k is None else Steering(experts_per_token=top_k) for top_k in TOP_KS]
    logits = paged_batch(runner, prompts, steerings, [CHUNKS[schedule](length) for length in LENGTHS])
    for prompt, top_k, actual in zip(prompts, TOP_KS, logits, strict=True):
        assert relative_error(actual, answer(models[top_k or 2], prompt)) < 1e-4
        other = answer(models[1 if top_k != 1 else 2], prompt)
        assert relative_error(actual, other) > 1e-2, "the K makes a difference"


def answer(model: MixtralForCausalLM, prompt: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([prompt])).logits[0]
    return logits
