"""The sampler's random stream: even, and a function of (seed, choice, position) and the distribution alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.sampler import SamplingRow, _mix, sample, uniform
from engine.types import SamplingParams
from tests.engine.test_sampler import CASES, OUTPUT, PROMPT, VOCAB, make_row, random_logits

EXTREME_SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 2**31, 12345)
STREAMS: dict[str, Callable[[int], float]] = {
    "positions": lambda i: uniform(0, 0, i),
    "positions_of_another_seed": lambda i: uniform(-(2**63), 3, i),
    "choices": lambda i: uniform(2**63 - 1, i, 5),
    "seeds": lambda i: uniform(i, 0, 0),
    "derived_seeds": lambda i: uniform((7 << 32) + i, 0, 0),
    "diagonal": lambda i: uniform(i, i, i),
}
# Quantiles of the chi-square distribution at 0.999 for the degrees of freedom used here.
CHI_SQUARE = {9: 27.88, 12: 32.91, 63: 103.44, 99: 148.23}


def chi_square(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.fixture(params=STREAMS)
def numbers(request: pytest.FixtureRequest) -> NDArray[np.float64]:
    stream = STREAMS[request.param]
    return np.array([stream(i) for i in range(20_000)])


def test_numbers_are_uniform(numbers: NDArray[np.float64]) -> None:
    count = len(numbers)
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert len(set(numbers.tolist())) == count
    assert abs(numbers.mean() - 1 / 2) < 3.3 * (1 / 12 / count) ** 0.5
    assert abs(numbers.var() - 1 / 12) < 3.3 * (1 / 180 / count) ** 0.5
    assert chi_square(np.bincount((numbers * 100).astype(np.int64)), np.full(100, count / 100)) < CHI_SQUARE[99]


def test_a_number_tells_nothing_of_the_next(numbers: NDArray[np.float64]) -> None:
    count = len(numbers)
    for lag in (1, 2, 16):
        assert abs(np.corrcoef(numbers[:-lag], numbers[lag:])[0, 1]) < 3.3 / count**0.5
    cells = (numbers[::2] * 8).astype(np.int64) * 8 + (numbers[1::2] * 8).astype(np.int64)
    assert chi_square(np.bincount(cells, minlength=64), np.full(64, count / 128)) < CHI_SQUARE[63]
    low_bits = (numbers * 2**53).astype(np.int64) % 2
    assert abs(low_bits.mean() - 1 / 2) < 3.3 * (1 / 4 / count) ** 0.5


def test_the_arguments_are_not_interchangeable() -> None:
    words = (0, 1, 2, 5, 2**40)
    drawn = {uniform(seed, choice, position) for seed in words for choice in words for position in words}
    assert len(drawn) == len(words) ** 3
    assert len({uniform(seed, 0, 0) for seed in EXTREME_SEEDS}) == len(EXTREME_SEEDS)
    streams = [np.array([uniform(seed, 0, i) for i in range(2000)]) for seed in EXTREME_SEEDS]
    correlations = np.corrcoef(np.stack(streams)) - np.eye(len(streams))
    assert np.abs(correlations).max() < 4 / 2000**0.5


def test_the_mixing_function_is_splitmix64() -> None:
    """The first outputs of the generator that its authors publish, seed 1234567."""
    states = [(1234567 + step * 0x9E3779B97F4A7C15) % 2**64 for step in range(1, 6)]
    assert [_mix(state) for state in states] == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_a_draw_is_the_first_token_at_which_the_running_sum_passes_the_number() -> None:
    logits = random_logits(200, VOCAB, seed=8)
    rows = [make_row(SamplingParams(choice=i % 3), seed=i // 7, output_ids=range(i)) for i in range(200)]
    probabilities = torch.softmax(logits.double(), dim=-1).tolist()
    for index, result in enumerate(sample(logits, rows).read()):
        left = uniform(index // 7, index % 3, index)
        expected = 0
        while (left := left - probabilities[index][expected]) >= 0:
            expected += 1
        assert result.token_id == expected


@pytest.mark.parametrize("seed", [0, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_draws_follow_the_distribution(seed: int, temperature: float) -> None:
    """Chi-square over 5,000 positions of one sequence; the wrong temperature would be seen."""
    count = 5000
    logits = random_logits(VOCAB, seed=11)
    params = SamplingParams(temperature=temperature)
    rows = [make_row(params, seed=seed, output_ids=range(position)) for position in range(count)]
    drawn = [result.token_id for result in sample(logits.expand(count, -1), rows).read()]
    counts = np.bincount(drawn, minlength=VOCAB)
    for scale, fits in ((temperature, True), (temperature * 1.2, False)):
        expected = torch.softmax(logits.double() / scale, dim=-1).numpy() * count
        assert (chi_square(counts, expected) < CHI_SQUARE[VOCAB - 1]) == fits


def test_choices_and_seeds_have_streams_of_their_own() -> None:
    logits = torch.zeros(1, 1000)
    drawn = {
        sample(logits, [make_row(SamplingParams(choice=choice), seed=seed)]).read()[0].token_id
        for choice in range(4)
        for seed in EXTREME_SEEDS
    }
    assert len(drawn) > 24  # of 28, equals by chance


def mixed_rows(count: int) -> list[SamplingRow]:
    """Rows of every kind, greedy ones and such as ask for log probabilities too."""
    params = [*CASES.values(), SamplingParams(temperature=0.0), SamplingParams(logprobs=3, top_p=0.6)]
    return [
        make_row(
            params[i % len(params)],
            seed=i * 31,
            prompt_ids=PROMPT[i % 3 :],
            output_ids=OUTPUT[: i % 7],
            end_ids=(i % VOCAB,),
        )
        for i in range(count)
    ]


def test_neighbours_and_order_change_nothing() -> None:
    """No parameter of a row reaches another row: alone, together and shuffled, all tokens are the same."""
    count = 3 * (len(CASES) + 2) + 1
    logits, rows = random_logits(count, VOCAB, seed=9), mixed_rows(count)
    alone = [sample(logits[i : i + 1], rows[i : i + 1]).read()[0] for i in range(count)]
    assert sample(logits, rows).read() == alone
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1)).tolist()
    assert sample(logits[order], [rows[i] for i in order]).read() == [alone[i] for i in order]
    for start in range(0, count, 7):
        assert sample(logits[start : start + 7], rows[start : start + 7]).read() == alone[start : start + 7]
