"""Counter-based draws: the published generator, bit for bit, evenly spread, and a function of the counter alone."""

from __future__ import annotations

import math
import random
from statistics import NormalDist

import pytest
import torch

from engine.routing.draws import normals, uniforms
from tests.engine.routing import slow

EDGES = [0, 1, -1, 2, 2**31, 2**32 - 1, 2**63 - 1, -(2**63), 1234567, -1234567]


def test_the_slow_generator_is_splitmix64() -> None:
    """The first numbers that the authors' C code gives for seed 1234567."""
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(slow.mix(state))
        state = (state + 0x9E3779B97F4A7C15) % 2**64
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def counters(count: int) -> tuple[list[int], list[int]]:
    rng = random.Random(0)
    seeds = EDGES + [rng.randrange(-(2**63), 2**63) for _ in range(count)]
    return seeds, [rng.choice([0, 1, 7, 4095, 2**31, rng.randrange(2**40)]) for _ in seeds]


@pytest.mark.parametrize("layer", [0, 1, 31])
def test_uniforms_are_the_top_bits(layer: int) -> None:
    seeds, positions = counters(50)
    actual = uniforms(torch.tensor(seeds), torch.tensor(positions), layer, 5)
    assert actual.dtype == torch.float32
    expected = [
        [slow.uniform(seed, position, layer, index) for index in range(5)]
        for seed, position in zip(seeds, positions, strict=True)
    ]
    assert actual.tolist() == expected


@pytest.mark.parametrize("layer", [0, 2])
def test_normals_invert_the_distribution_of_the_top_bits(layer: int) -> None:
    seeds, positions = counters(50)
    actual = normals(torch.tensor(seeds), torch.tensor(positions), layer, 3)
    assert actual.dtype == torch.float32
    for row, seed, position in zip(actual.tolist(), seeds, positions, strict=True):
        for index, value in enumerate(row):
            fraction = ((slow.bits(seed, position, layer, index) >> 33) + 0.5) / 2**31
            assert value == pytest.approx(NormalDist().inv_cdf(fraction), rel=1e-5, abs=1e-6)


# What varies from draw to draw: each alone must spread the numbers, small steps or not.
SEQUENCES = {
    "seeds": (range(20_000), [3] * 20_000),
    "far seeds": (range(0, 20_000 << 32, 1 << 32), [3] * 20_000),
    "positions": ([42] * 20_000, range(20_000)),
    "both": (range(20_000), range(20_000)),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_numbers_are_spread_evenly(name: str) -> None:
    seeds, positions = (torch.tensor(list(values)) for values in SEQUENCES[name])
    drawn = uniforms(seeds, positions, 1, 2).double()
    assert drawn.min() >= 0
    assert drawn.max() < 1
    for column in (0, 1):
        counts = torch.histc(drawn[:, column], 64, 0, 1)
        chi_squared = float(((counts - 20_000 / 64) ** 2 / (20_000 / 64)).sum())
        assert 30 < chi_squared < 110, "63 degrees of freedom: 63 on average, deviation 11"
    pairs = {"columns": (drawn[:, 0], drawn[:, 1]), "neighbours": (drawn[:-1, 0], drawn[1:, 0])}
    for what, (one, other) in pairs.items():
        assert abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])) < 4 / math.sqrt(20_000), what


def test_layers_draw_different_numbers() -> None:
    seeds, positions = torch.arange(5_000), torch.arange(5_000)
    drawn = torch.stack([uniforms(seeds, positions, layer, 1)[:, 0] for layer in range(4)])
    off_diagonal = torch.corrcoef(drawn) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 5 / math.sqrt(5_000)


def test_normals_are_normal() -> None:
    drawn = normals(torch.arange(50_000), torch.zeros(50_000, dtype=torch.int64), 0, 2).flatten().double()
    assert torch.isfinite(drawn).all()
    distances = torch.special.ndtr(drawn.sort().values) - (torch.arange(100_000) + 0.5) / 100_000
    assert float(distances.abs().max()) < 1.63 / math.sqrt(100_000), "Kolmogorov-Smirnov at one in a hundred"
    assert float(drawn.mean()) == pytest.approx(0, abs=0.013)
    assert float(drawn.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("draw", [uniforms, normals])
def test_a_token_draws_the_same_in_every_batch(draw: object) -> None:
    assert callable(draw)
    seeds, positions = (torch.tensor(values) for values in counters(30))
    together = draw(seeds, positions, 5, 4)
    order = torch.randperm(len(seeds), generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(seeds[order], positions[order], 5, 4), together[order])
    assert torch.equal(draw(seeds[7:8], positions[7:8], 5, 4), together[7:8])
    assert torch.equal(draw(seeds, positions, 5, 2), together[:, :2]), "nor does it matter how many are drawn"
