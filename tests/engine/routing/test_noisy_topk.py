"""Noisy top-K against equations 3 to 9 of Shazeer et al. 2017: weights exactly, selection frequencies statistically."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.routing.base import Routing
from engine.routing.draws import normals
from engine.routing.noisy_topk import NoisyTopK
from engine.routing.topk_softmax import TopKSoftmax
from tests.engine.routing.inputs import route

TOKENS = 20_000


def repeat(row: list[float]) -> Tensor:
    return torch.tensor(row).expand(TOKENS, len(row))


def frequencies(routing: Routing, num_experts: int) -> Tensor:
    """Share of tokens that chose each expert: [E]."""
    return torch.bincount(routing.expert_ids.flatten().long(), minlength=num_experts).double() / TOKENS


def deviations(actual: Tensor, expected: Tensor, num_samples: int = TOKENS) -> float:
    """The largest difference of two lists of frequencies, in standard deviations of `actual`'s."""
    spread = (expected * (1 - expected) / num_samples).sqrt().clamp(min=1 / num_samples)
    return float(((actual - expected).abs() / spread).max())


def selection_probability(logits: Tensor, scale: Tensor, noise: Tensor, top_k: int) -> Tensor:
    """Equations 8 and 9 for H = logits + noise * scale [T, E]: the chance that i is among the top K when its noise
    alone is drawn anew, Phi((logits_i - kth_excluding(H, K, i)) / scale_i)."""
    values = logits + noise * scale
    columns = []
    for expert in range(values.shape[1]):
        others = torch.cat((values[:, :expert], values[:, expert + 1 :]), dim=1)
        threshold = others.topk(top_k, dim=1).values[:, -1]
        columns.append(torch.special.ndtr((logits[:, expert] - threshold) / scale[:, expert]))
    return torch.stack(columns, dim=1)


CASES = {
    "noise of a gate": ([0.5, 0.0, -0.5, 1.0, 0.2], [0.0, 1.0, -1.0, 0.5, 2.0]),
    "scale 1": ([0.5, 0.0, -0.5, 1.0, 0.2], None),
    "equal gates": ([0.0, 0.0, 0.0, 0.0], [0.3, 0.3, 0.3, 0.3]),
    "one far ahead": ([4.0, 0.0, 0.1, -0.1], [-1.0, -1.0, -1.0, -1.0]),
}


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_selection_frequencies_are_the_papers(name: str, top_k: int) -> None:
    row, noise_row = CASES[name]
    num_experts = len(row)
    noise = None if noise_row is None else repeat(noise_row)
    routing = route(NoisyTopK(num_experts, draws=True), repeat(row), top_k, noise=noise)
    actual = frequencies(routing, num_experts)
    assert float(actual.sum()) == pytest.approx(top_k)
    scale = torch.ones(1, num_experts) if noise_row is None else F.softplus(torch.tensor([noise_row]))
    generator = torch.Generator().manual_seed(5)
    others = torch.randn(100_000, num_experts, generator=generator)
    logits = torch.tensor([row])
    formula = selection_probability(
        logits.expand(100_000, -1).double(), scale.expand(100_000, -1).double(), others.double(), top_k
    )
    assert deviations(actual, formula.mean(dim=0)) < 4.5


@pytest.mark.parametrize(("gap", "noise"), [(0.0, 0.0), (0.7, 1.0), (-1.3, -0.5), (2.0, 3.0)])
def test_two_experts_in_closed_form(gap: float, noise: float) -> None:
    """The difference of two normals is normal: P(1 before 0) = Phi(gap / sqrt(s0^2 + s1^2)), s = softplus."""
    routing = route(NoisyTopK(2, draws=True), repeat([0.0, gap]), 1, noise=repeat([noise, noise / 2]))
    spread = math.hypot(math.log1p(math.exp(noise)), math.log1p(math.exp(noise / 2)))
    expected = NormalDist().cdf(gap / spread)
    assert deviations(frequencies(routing, 2)[1:], torch.tensor([expected]).double()) < 4


def test_each_token_is_routed_by_its_own_noisy_gates() -> None:
    """H from the draws themselves, and softmax over its K largest (equations 3 to 5)."""
    generator = torch.Generator().manual_seed(0)
    logits, noise = torch.randn(300, 6, generator=generator), torch.randn(300, 6, generator=generator)
    seeds, positions = list(range(300)), list(range(7, 307))
    routing = route(NoisyTopK(6, draws=True), logits, 3, noise=noise, seeds=seeds, positions=positions)
    drawn = normals(torch.tensor(seeds), torch.tensor(positions), 0, 6)
    values = logits + drawn * F.softplus(noise)
    kept, expert_ids = values.topk(3)
    assert torch.equal(routing.expert_ids, expert_ids.int())
    torch.testing.assert_close(routing.weights, torch.softmax(kept, dim=-1))
    assert routing.logits is logits, "balance is measured on the gates without their noise"
    assert not torch.equal(routing.expert_ids, logits.topk(3).indices.int())


def test_without_noise_it_is_top_k() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    quiet = route(NoisyTopK(6, draws=False), logits, 2, noise=torch.full((50, 6), 9.0))
    plain = route(TopKSoftmax(6, renormalize=True), logits, 2)
    assert torch.equal(quiet.expert_ids, plain.expert_ids)
    assert torch.equal(quiet.weights, plain.weights)


def test_a_token_draws_the_same_noise_in_every_batch_and_not_the_same_as_others() -> None:
    router = NoisyTopK(6, draws=True)
    logits = torch.zeros(64, 6)
    seeds, positions = [5] * 32 + list(range(32)), [*range(32), *[3] * 32]
    together = route(router, logits, 2, seeds=seeds, positions=positions)
    for token in (0, 3, 31, 40, 63):
        alone = route(router, logits[:1], 2, seeds=[seeds[token]], positions=[positions[token]])
        assert torch.equal(alone.weights[0], together.weights[token])
    assert len({tuple(row) for row in together.weights.tolist()}) == 63, "tokens 3 and 37 are one and the same"
