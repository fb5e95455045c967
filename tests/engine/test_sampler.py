"""Sampler: what can be drawn, with which share, against transformers' logits processors; log probabilities.

Numbers of the random stream are replaced by N evenly spread ones, so that a share is read off exactly: a token of
probability p is drawn N * p times, give or take one. The stream itself: test_sampler_draws.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from engine import sampler
from engine.sampler import SamplingRow, logprobs_of, sample
from engine.types import SamplingParams

VOCAB = 13
GRID = 1024
PROMPT, OUTPUT = (0, 1, 2, 2, 9), (2, 3, 3, 3, 9, 12)


def make_row(
    params: SamplingParams,
    *,
    seed: int = 0,
    prompt_ids: Sequence[int] = (0,),
    output_ids: Sequence[int] = (),
    end_ids: Sequence[int] = (),
) -> SamplingRow:
    return SamplingRow(params, seed, prompt_ids, output_ids, end_ids)


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    """Bounded, so that hardly a token of a row has less than 1/GRID, and all different."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).tanh() * 2.6


def shares(logits: Tensor, row: SamplingRow, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The share [V] of each token when one row of `logits` [V] is drawn GRID times."""
    numbers = iter([(i + 0.5) / GRID for i in range(GRID)])
    with monkeypatch.context() as patch:
        patch.setattr(sampler, "uniform", lambda *_: next(numbers))
        drawn = [result.token_id for result in sample(logits.expand(GRID, -1), [row] * GRID).read()]
    return torch.bincount(torch.tensor(drawn), minlength=logits.shape[0]) / GRID


def expected_shares(logits: Tensor, row: SamplingRow) -> Tensor:
    """The same by transformers, in this project's order; penalties of the output by OpenAI's formula, in a loop."""
    params = row.params
    scores = logits.clone().unsqueeze(0)
    seen = torch.tensor([[*row.prompt_ids, *row.output_ids]])
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, scores)
    for token_id in range(logits.shape[0]):
        count = sum(1 for output_id in row.output_ids if output_id == token_id)
        scores[0, token_id] -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
    for token_id, bias in params.logit_bias:
        scores[0, token_id] += bias
    if len(row.output_ids) < params.min_tokens:
        scores[0, list(row.end_ids)] = -torch.inf
    scores = TemperatureLogitsWarper(params.temperature)(seen, scores)
    if params.top_k > 0:
        scores = TopKLogitsWarper(params.top_k)(seen, scores)
    if params.top_p < 1.0:
        scores = TopPLogitsWarper(params.top_p)(seen, scores)
    if params.min_p > 0.0:
        scores = MinPLogitsWarper(params.min_p)(seen, scores)
    result: Tensor = torch.softmax(scores[0], dim=-1)
    return result


CASES: dict[str, SamplingParams] = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.4),
    "hot": SamplingParams(temperature=2.0),
    "top_k": SamplingParams(top_k=4),
    "top_k_all": SamplingParams(top_k=VOCAB + 20),
    "top_k_off": SamplingParams(top_k=-1),
    "top_p": SamplingParams(top_p=0.7),
    "top_p_cold": SamplingParams(top_p=0.8, temperature=0.6),
    "min_p": SamplingParams(min_p=0.2),
    "min_p_hot": SamplingParams(min_p=0.3, temperature=1.7),
    "top_k_top_p": SamplingParams(top_k=6, top_p=0.75),
    "all_filters": SamplingParams(top_k=9, top_p=0.9, min_p=0.15, temperature=1.3),
    "repetition": SamplingParams(repetition_penalty=1.7),
    "repetition_under_one": SamplingParams(repetition_penalty=0.6),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=0.4),
    "negative_penalties": SamplingParams(presence_penalty=-1.0, frequency_penalty=-0.2),
    "bias": SamplingParams(logit_bias=((4, 2.5), (0, -3.0), (12, 1.0))),
    "min_tokens": SamplingParams(min_tokens=7),
    "min_tokens_reached": SamplingParams(min_tokens=6),
    "everything": SamplingParams(
        temperature=0.9,
        top_k=10,
        top_p=0.92,
        min_p=0.05,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=((3, 1.0), (5, -1.0)),
        min_tokens=9,
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_shares_equal_those_of_transformers(case: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(VOCAB, seed=seed)
    row = make_row(CASES[case], prompt_ids=PROMPT, output_ids=OUTPUT, end_ids=(5, 7, 5))
    actual, expected = shares(logits, row, monkeypatch), expected_shares(logits, row)
    assert ((actual - expected).abs() <= 1.01 / GRID).all()
    assert not (actual > 0)[expected == 0].any(), "drawn, though it was filtered out"
    assert (actual > 0)[expected > 1.01 / GRID].all()


def test_penalties_look_where_they_should(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repetition at prompt and output, presence and frequency at the output alone."""
    logits = random_logits(VOCAB)
    row = make_row(SamplingParams(presence_penalty=2.0, frequency_penalty=2.0), prompt_ids=tuple(range(VOCAB)))
    untouched = shares(logits, make_row(SamplingParams()), monkeypatch)
    assert torch.equal(shares(logits, row, monkeypatch), untouched)
    row = replace(row, params=SamplingParams(repetition_penalty=1.5))
    assert not torch.equal(shares(logits, row, monkeypatch), untouched)


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-60}, {"min_p": 1.0}, {"top_k": 1, "top_p": 1e-9}], ids=str
)
def test_filters_at_their_narrowest_leave_the_best(narrow: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    row = make_row(SamplingParams(temperature=2.0, **narrow))  # type: ignore[arg-type]
    for best in (0, 6, VOCAB - 1):
        logits = random_logits(VOCAB)
        logits[best] = 2.7
        assert shares(logits, row, monkeypatch)[best] == 1.0


def test_a_bias_forces_and_forbids(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(VOCAB)
    for token_id in (0, 5, VOCAB - 1):
        forced = make_row(SamplingParams(logit_bias=((token_id, 100.0),), temperature=2.0))
        assert shares(logits, forced, monkeypatch)[token_id] == 1.0
        forbidden = replace(forced, params=SamplingParams(logit_bias=((token_id, -100.0),)))
        assert shares(logits, forbidden, monkeypatch)[token_id] == 0.0
    greedy = make_row(SamplingParams(temperature=0.0, logit_bias=((8, 100.0),)))
    assert sample(logits[None], [greedy]).read()[0].token_id == 8


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_end_before_min_tokens(temperature: float) -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, [3, 6]] = 50.0
    params = SamplingParams(temperature=temperature, min_tokens=2, logit_bias=((3, 100.0),))
    for num_output in range(4):
        row = make_row(params, output_ids=[0] * num_output, end_ids=(3, 6))
        assert (sample(logits, [row]).read()[0].token_id == 3) == (num_output >= 2)
    assert sample(logits, [make_row(params, output_ids=[0])]).read()[0].token_id == 3  # nothing ends this one


def test_greedy_takes_the_best_and_of_equals_the_first() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[1, [9, 4, 11]] = 3.0
    logits[2, 12] = 1.0
    logits[3, 0] = -1.0
    for temperature in (0.0, 9e-6):
        row = make_row(SamplingParams(temperature=temperature))
        assert [result.token_id for result in sample(logits, [row] * 4).read()] == [0, 4, 12, 1]


def test_nearly_no_temperature_is_nearly_greedy() -> None:
    logits = random_logits(20, VOCAB, seed=2)
    rows = [make_row(SamplingParams(temperature=1e-5, seed=i), seed=i) for i in range(20)]
    assert [result.token_id for result in sample(logits, rows).read()] == logits.argmax(-1).tolist()


def test_impossible_tokens_are_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[2, 7]] = torch.tensor([1.0, 2.0])
    for params in (SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.99, repetition_penalty=1.5)):
        drawn = shares(logits, make_row(params, prompt_ids=(0, 2), output_ids=(1,)), monkeypatch)
        assert drawn.nonzero().flatten().tolist() == [2, 7]
    logits[2] = -torch.inf
    for number in (0.0, 0.5, 1.0 - 2.0**-53):
        monkeypatch.setattr(sampler, "uniform", lambda *_, number=number: number)
        assert sample(logits[None], [make_row(SamplingParams(top_p=0.5))]).read()[0].token_id == 7


def test_a_tiny_probability_is_left_to_those_who_filter_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Top-k alone keeps the second best, though the best has all of the probability that float32 can tell from 1."""
    logits = torch.full((1, VOCAB), -30.0)
    logits[0, [3, 9]] = torch.tensor([0.0, -20.0])
    monkeypatch.setattr(sampler, "uniform", lambda *_: 1.0 - 1e-9)
    rows = [make_row(SamplingParams(top_k=2)), make_row(SamplingParams(top_k=2, top_p=0.9999))]
    assert [result.token_id for result in sample(logits.expand(2, -1), rows).read()] == [9, 3]


def test_the_ends_of_the_stream_reach_the_ends_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(1, VOCAB)
    for number, expected in ((0.0, 0), (1.0 - 2.0**-53, VOCAB - 1)):
        monkeypatch.setattr(sampler, "uniform", lambda *_, number=number: number)
        assert sample(logits, [make_row(SamplingParams())]).read()[0].token_id == expected


def test_equal_logits_are_drawn_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = shares(torch.full((8,), 3.25), make_row(SamplingParams(top_p=1.0)), monkeypatch)
    assert drawn.tolist() == [1 / 8] * 8
    drawn = shares(torch.zeros(2), make_row(SamplingParams()), monkeypatch)
    assert drawn.tolist() == [0.5, 0.5]
    drawn = shares(torch.zeros(8), make_row(SamplingParams(top_k=3)), monkeypatch)
    assert drawn.nonzero().flatten().tolist() == [0, 1, 2]


def test_the_logits_are_left_alone() -> None:
    logits = random_logits(len(CASES), VOCAB)
    before = logits.clone()
    rows = [
        make_row(replace(params, logprobs=3), prompt_ids=PROMPT, output_ids=OUTPUT, end_ids=(5,))
        for params in CASES.values()
    ]
    sample(logits, rows)
    assert torch.equal(logits, before)


def test_log_probabilities_are_of_the_raw_distribution() -> None:
    logits = random_logits(len(CASES), VOCAB, seed=3) * 4
    rows = [
        make_row(replace(params, logprobs=index % 5), prompt_ids=PROMPT, output_ids=OUTPUT, end_ids=(5,), seed=index)
        for index, params in enumerate(CASES.values())
    ]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for index, result in enumerate(sample(logits, rows).read()):
        report, row = result.logprobs, expected[index].tolist()
        assert report is not None
        assert report.token_id == result.token_id
        assert report.logprob == pytest.approx(row[result.token_id], abs=1e-5)
        assert report.rank == 1 + sum(1 for value in row if value > row[result.token_id])
        best = sorted(range(VOCAB), key=lambda token_id: -row[token_id])[: index % 5]
        assert [token_id for token_id, _ in report.top] == best
        assert [value for _, value in report.top] == pytest.approx([row[token_id] for token_id in best], abs=1e-5)


def test_only_those_who_ask_get_log_probabilities() -> None:
    rows = [make_row(SamplingParams(logprobs=number)) for number in (None, 0, 2, None)]
    reports = [result.logprobs for result in sample(random_logits(4, VOCAB), rows).read()]
    assert [None if report is None else len(report.top) for report in reports] == [None, 0, 2, None]


def test_log_probabilities_of_given_tokens() -> None:
    logits = random_logits(5, VOCAB, seed=6)
    token_ids = [0, 12, 3, 3, 7]
    expected = torch.log_softmax(logits, dim=-1)
    for index, report in enumerate(logprobs_of(logits, token_ids, 2).read()):
        row = expected[index]
        assert report.token_id == token_ids[index]
        assert report.logprob == pytest.approx(row[token_ids[index]].item(), abs=1e-6)
        assert report.rank == 1 + int((row > row[token_ids[index]]).sum())
        assert [token_id for token_id, _ in report.top] == row.argsort(descending=True)[:2].tolist()
    assert logprobs_of(logits[:0], [], 2).read() == []


def test_equals_in_the_list_of_the_best_come_in_the_order_of_their_ids() -> None:
    """bfloat16 logits are often equal: the list must then begin with the token that greedy sampling takes."""
    logits = torch.zeros(1, 40)
    logits[0, [31, 17, 25]] = 2.0
    (result,) = sample(logits, [make_row(SamplingParams(temperature=0.0, logprobs=4))]).read()
    assert result.logprobs is not None
    assert result.token_id == 17
    assert [token_id for token_id, _ in result.logprobs.top] == [17, 25, 31, 0]


def test_more_log_probabilities_than_tokens() -> None:
    (result,) = sample(torch.tensor([[0.0, 1.0]]), [make_row(SamplingParams(temperature=0.0, logprobs=5))]).read()
    assert result.logprobs is not None
    assert [token_id for token_id, _ in result.logprobs.top] == [1, 0]
