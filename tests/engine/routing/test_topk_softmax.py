"""TopKSoftmax against transformers' router of Mixtral, and where that one promises nothing, against a loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

from engine.routing.base import Routing
from engine.routing.topk_softmax import TopKSoftmax
from tests.engine.routing.inputs import route

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def choose(logits: Tensor, top_k: int, *, renormalize: bool) -> Routing:
    return route(TopKSoftmax(logits.shape[1], renormalize), logits, top_k)


def random_logits(num_tokens: int, num_experts: int, *, seed: int = 0) -> Tensor:
    """Gates of a token differ by at least 1/16: exact in every dtype, and no ties."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.stack([torch.randperm(num_experts, generator=generator) for _ in range(num_tokens)])
    return ranks / 16 - torch.randint(0, 3, (num_tokens, 1), generator=generator)


def by_transformers(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Weights and expert ids [T, K] of MixtralTopKRouter: with the identity for a gate, its input is the logits."""
    num_experts = logits.shape[-1]
    config = MixtralConfig(num_local_experts=num_experts, num_experts_per_tok=top_k, hidden_size=num_experts)
    router = MixtralTopKRouter(config)
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
        _, weights, expert_ids = router.to(logits.dtype)(logits)
    return weights, expert_ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (8, 1), (4, 4), (1, 1), (5, 3), (64, 8), (2, 1)])
def test_equals_transformers(num_experts: int, top_k: int, dtype: torch.dtype) -> None:
    logits = random_logits(37, num_experts, seed=top_k).to(dtype)
    routing = choose(logits, top_k, renormalize=True)
    weights, expert_ids = by_transformers(logits, top_k)
    assert torch.equal(routing.expert_ids, expert_ids.int())
    torch.testing.assert_close(routing.weights, weights.float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_comes_out(dtype: torch.dtype) -> None:
    logits = random_logits(7, 5).to(dtype)
    routing = choose(logits, 3, renormalize=True)
    assert (routing.expert_ids.dtype, routing.weights.dtype) == (torch.int32, torch.float32)
    assert routing.expert_ids.shape == routing.weights.shape == (7, 3)
    assert routing.logits is logits
    assert ((routing.weights.sum(-1) - 1).abs() < 1e-6).all()
    assert (routing.weights[:, :-1] > routing.weights[:, 1:]).all()


def test_without_renormalizing_the_weights_are_shares_of_the_full_softmax() -> None:
    logits = random_logits(20, 6, seed=4)
    routing = choose(logits, 2, renormalize=False)
    expected = torch.softmax(logits.double(), -1).gather(-1, routing.expert_ids.long())
    torch.testing.assert_close(routing.weights, expected.float())
    assert (routing.weights.sum(-1) < 0.99).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3, 7])
def test_ties_go_to_the_lower_expert(top_k: int, dtype: torch.dtype) -> None:
    """Gates of three values only, against a sort by (probability, index)."""
    logits = torch.randint(0, 3, (200, 7), generator=torch.Generator().manual_seed(top_k)).to(dtype)
    routing = choose(logits, top_k, renormalize=True)
    for row, chosen in zip(logits.tolist(), routing.expert_ids.tolist(), strict=True):
        assert chosen == sorted(range(7), key=lambda expert: (-row[expert], expert))[:top_k]


def test_many_equal_gates_of_many_experts() -> None:
    routing = choose(torch.zeros(3, 128), 8, renormalize=True)
    assert routing.expert_ids.tolist() == [list(range(8))] * 3
    assert routing.weights.tolist() == [[1 / 8] * 8] * 3


def test_half_precision_gates_are_weighed_in_float32() -> None:
    """In float16 the softmax of 512 equal gates but one would lose all but three digits."""
    logits = torch.zeros(1, 512, dtype=torch.float16)
    logits[0, 300] = 1.0
    routing = choose(logits, 1, renormalize=False)
    assert routing.expert_ids.tolist() == [[300]]
    assert routing.weights.item() == pytest.approx(2.718281828 / (511 + 2.718281828), rel=1e-6)


def test_gates_that_are_far_apart_stay_finite() -> None:
    routing = choose(torch.tensor([[-60000.0, 60000.0, -60000.0], [-3e38, -3e38, 3e38]]), 2, renormalize=True)
    assert routing.expert_ids.tolist() == [[1, 0], [2, 0]]
    assert routing.weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_no_tokens() -> None:
    assert choose(torch.empty(0, 4), 2, renormalize=True).expert_ids.shape == (0, 2)
