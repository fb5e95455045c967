"""Masks of a batch against a plain loop over rows and tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.grammar import GrammarError, GrammarSpec, GrammarVocabulary, Matcher
from engine.grammar.build import build
from engine.grammar.matcher import TokenBits, num_bytes
from engine.masks import MaskedRow, TokenMasks, fill
from engine.sampler import SamplingRow, logprobs_of, masked_rows, sample
from engine.types import SamplingParams

CPU = torch.device("cpu")
SIZES = [1, 7, 8, 9, 31, 32, 33, 64, 260, 1001]


class Fixed(Matcher):
    """Allows what it is told to, or fails. What is beyond the vocabulary is as a library may leave it."""

    def __init__(self, allowed: Sequence[int] | None, end_ids: Sequence[int] = ()) -> None:
        self._allowed = allowed
        self.end_ids = end_ids

    def fill(self, bits: TokenBits) -> None:
        if self._allowed is None:
            bits[::2] = 0
            raise GrammarError("too complex")
        bits[:] = 0
        for token_id in self._allowed:
            bits[token_id // 8] |= 1 << token_id % 8


def masks_of(rows: Sequence[MaskedRow], vocab_size: int) -> TokenMasks:
    masks, failed = fill(rows, vocab_size=vocab_size, device=CPU)
    assert failed == {}
    return masks


def random_logits(rows: int, vocab_size: int) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(rows * vocab_size))


@pytest.mark.parametrize("vocab_size", SIZES)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_apply_equals_a_plain_loop(vocab_size: int, batch: int) -> None:
    """For every choice of rows that have a grammar, in any order."""
    rng = random.Random(vocab_size)
    for masked in range(1, batch + 1):
        allowed = {
            row: rng.sample(range(vocab_size), rng.randint(0, vocab_size)) for row in rng.sample(range(batch), masked)
        }
        logits = random_logits(batch, vocab_size)
        expected = [
            [
                value if row not in allowed or token_id in allowed[row] else float("-inf")
                for token_id, value in enumerate(values)
            ]
            for row, values in enumerate(logits.tolist())
        ]
        masks_of([MaskedRow(row, Fixed(ids)) for row, ids in allowed.items()], vocab_size).apply(logits)
        assert logits.tolist() == expected


def test_what_lies_beyond_the_vocabulary_does_not_matter() -> None:
    """A row of bits is whole words of 32; this one's are all set."""
    logits = random_logits(1, 33)
    before = logits.clone()
    bits = torch.full((1, num_bytes(33)), 0xFF, dtype=torch.uint8)
    TokenMasks(torch.tensor([0]), bits).apply(logits)
    assert torch.equal(logits, before)


def allowed_by(rows: Sequence[MaskedRow], vocab_size: int) -> list[set[int]]:
    bits = masks_of(rows, vocab_size).bits.numpy()
    return [{*np.flatnonzero(np.unpackbits(row, bitorder="little")).tolist()} for row in bits]


@pytest.mark.parametrize(
    ("allowed", "banned", "left"),
    [
        ({1, 2, 30}, (), {1, 2, 30}),
        ({1, 2, 30}, (2,), {1, 30}),
        ({1, 2, 30}, (2, 30, 17), {1}),
        ({1, 2, 30}, (1, 2, 30), {1, 2, 30}),  # nothing else is left
        ({7, 8}, (7,), {8}),
        ({0}, (0, 0), {0}),
        ({0, 31}, (31, 31), {0}),
        ({5}, (6,), {5}),
    ],
)
def test_what_is_banned_unless_nothing_else_is_left(allowed: set[int], banned: Sequence[int], left: set[int]) -> None:
    assert allowed_by([MaskedRow(0, Fixed([*allowed]), banned)], 32) == [left]


def test_a_matcher_that_fails_concerns_its_row_alone() -> None:
    rows = [
        MaskedRow(0, Fixed([3]), (5,)),
        MaskedRow(2, Fixed(None), (1,)),
        MaskedRow(3, Fixed([4, 5]), (5,)),
        MaskedRow(7, Fixed(None)),
    ]
    masks, failed = fill(rows, vocab_size=9, device=CPU)
    assert failed == {2: "too complex", 7: "too complex"}
    logits = random_logits(9, 9)
    expected = logits.clone()
    for row, token_id in ((0, 3), (3, 4)):
        expected[row] = float("-inf")
        expected[row, token_id] = logits[row, token_id]
    masks.apply(logits)
    assert torch.equal(logits, expected), "rows that failed may have any token"


@pytest.mark.parametrize("vocab_size", SIZES[1:])
def test_a_real_grammar(vocab_size: int) -> None:
    pieces = {0: b"a", 1: b"b", 2: b"ab", 3: b"x", 4: b"<end>"}
    library = GrammarVocabulary.of(pieces, [4], [4], vocab_size).to_library()
    start = build(GrammarSpec.regex("(ab)*").source(), library)
    inside = start.copy()
    inside.consume(0)
    assert allowed_by([MaskedRow(0, inside), MaskedRow(1, start), MaskedRow(2, start, (4,))], vocab_size) == [
        {1},
        {0, 2, 4},
        {0, 2},
    ]


def row(params: SamplingParams, allowed: Sequence[int] | None, **fields: object) -> SamplingRow:
    matcher = None if allowed is None else Fixed(allowed, end_ids=(1,))
    return SamplingRow(params, 0, (0,), **{"output_ids": (), "end_ids": (), **fields}, matcher=matcher)  # type: ignore[arg-type]


def drawn(logits: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
    masks, failed = fill(masked_rows(rows), vocab_size=logits.shape[-1], device=CPU)
    assert failed == {}
    return [sampled.token_id for sampled in sample(logits, rows, masks).read()]


GREEDY = SamplingParams(temperature=0.0)


def test_only_rows_with_a_grammar_are_masked() -> None:
    logits = torch.arange(10.0).expand(4, 10).contiguous()
    rows = [row(GREEDY, None), row(GREEDY, [2, 4]), row(GREEDY, None), row(GREEDY, [0])]
    assert [(masked.index, masked.banned_ids) for masked in masked_rows(rows)] == [(1, ()), (3, ())]
    assert drawn(logits, rows) == [9, 4, 9, 0]
    assert torch.equal(logits, torch.arange(10.0).expand(4, 10)), "the logits are not changed"


@pytest.mark.parametrize("limit", [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}, {}])
def test_the_mask_comes_before_temperature_and_what_cuts_off(limit: dict[str, float]) -> None:
    """Of the likeliest tokens none is allowed: a cut before the mask would leave nothing."""
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0, 1.0, -50.0]]).expand(200, 6).contiguous()
    params = SamplingParams(temperature=1.5, **limit)  # type: ignore[arg-type]
    rows = [SamplingRow(params, seed, (0,), (), (), Fixed([3, 4, 5])) for seed in range(200)]
    tokens = drawn(logits, rows)
    assert {*tokens} <= {3, 4}
    assert {*tokens} == ({3} if limit == {"top_p": 0.5} else {3, 4})


def test_bias_and_penalties_come_before_the_mask() -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0, 0.1]])
    forbidden = SamplingParams(temperature=0.0, logit_bias=((0, 100.0),))
    assert drawn(logits, [row(forbidden, [1, 2, 3])]) == [1]
    lifted = SamplingParams(temperature=0.0, logit_bias=((2, 100.0),))
    assert drawn(logits, [row(lifted, [1, 2, 3])]) == [2]
    lowered = SamplingParams(temperature=0.0, logit_bias=((1, -100.0),))
    assert drawn(logits, [row(lowered, [1, 2])]) == [2]
    assert drawn(logits, [row(lowered, [1])]) == [1]
    penalised = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    assert drawn(logits, [row(penalised, [1, 3], output_ids=(1, 1))]) == [3]


def test_no_end_before_min_tokens_unless_nothing_else_is_left() -> None:
    """With or without ignore_eos: the end of a grammar's text (here token 1) always ends it."""
    logits = torch.tensor([[0.0, 9.0, 1.0, 5.0]])
    for fields in ({"end_ids": (1, 3)}, {"end_ids": (3,)}):
        params = SamplingParams(temperature=0.0, min_tokens=2)
        assert drawn(logits, [row(params, [0, 1, 2, 3], **fields)]) == [2]
        assert drawn(logits, [row(params, [1], **fields)]) == [1]
        assert drawn(logits, [row(params, [1, 3], **fields)]) == [1]
        assert drawn(logits, [row(params, [0, 1, 2], output_ids=(2,), **fields)]) == [2]
        assert drawn(logits, [row(params, [0, 1, 2, 3], output_ids=(2, 2), **fields)]) == [1]


def test_log_probabilities_are_of_the_model() -> None:
    logits = random_logits(2, 20)
    params = SamplingParams(temperature=0.7, logprobs=20)
    rows = [row(params, [3, 4]), row(params, None)]
    masks, _ = fill(masked_rows(rows), vocab_size=20, device=CPU)
    for index, sampled in enumerate(sample(logits, rows, masks).read()):
        (expected,) = logprobs_of(logits[index : index + 1], [sampled.token_id], 20).read()
        assert sampled.logprobs == expected
        assert all(value > float("-inf") for _, value in expected.top)
    assert sample(logits, rows, masks).read()[0].token_id in (3, 4)


def test_a_row_without_a_grammar_draws_what_it_draws_alone() -> None:
    logits = random_logits(6, 50)
    params = SamplingParams(temperature=1.0)
    plain = [SamplingRow(params, seed, (0,), (), ()) for seed in range(6)]
    alone = [sampled.token_id for sampled in sample(logits, plain).read()]
    mixed = [SamplingRow(params, seed, (0,), (), (), Fixed([seed]) if seed % 2 else None) for seed in range(6)]
    assert drawn(logits, mixed) == [seed if seed % 2 else alone[seed] for seed in range(6)]
