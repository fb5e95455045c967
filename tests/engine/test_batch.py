"""Batch: the example of its docstring, and random plans against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.batch import build, logits_rows
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence
from engine.types import Request, SamplingParams, Steering
from tests.engine.routing.inputs import plain_table

CPU = torch.device("cpu")


def make_chunk(
    num_tokens: int,
    start: int,
    length: int,
    block_table: list[int],
    *,
    first_id: int = 0,
    steering: Steering | None = None,
    seed: int = 0,
    choice: int = 0,
) -> Chunk:
    """Tokens [start, start + length) of a sequence of `num_tokens` tokens first_id, first_id + 1, …"""
    request = Request(
        request_id="r",
        prompt_ids=tuple(range(first_id, first_id + num_tokens)),
        params=SamplingParams(choice=choice),
        steering=steering,
    )
    sequence = Sequence(request, arrival=0, seed=seed)
    sequence.block_table = block_table
    sequence.num_computed = start
    return Chunk(sequence, start, length)


def test_the_example() -> None:
    plan = StepPlan((make_chunk(6, 5, 1, [7, 2], first_id=10), make_chunk(3, 0, 3, [3], first_id=50)))
    batch = build(plan, block_size=4, steering=plain_table(), device=CPU)
    assert batch.num_tokens == 4
    assert batch.input_ids.tolist() == [15, 50, 51, 52]
    assert batch.positions.tolist() == [5, 0, 1, 2]
    assert batch.slot_mapping.tolist() == [9, 12, 13, 14]
    assert batch.block_tables.tolist() == [[7, 2], [3, 0]]
    assert batch.cu_seqlens.tolist() == [0, 1, 4]
    assert batch.seq_lens.tolist() == [6, 3]
    assert batch.logits_indices.tolist() == [0, 3]
    assert (batch.query_lens, batch.context_lens) == ([1, 3], [6, 3])


def test_routing_inputs() -> None:
    """Tokens share slot, seed and position with their request; K_max is the largest of the batch."""
    table = plain_table(num_experts=4, top_k=2, num_slots=4)
    one, four = Steering(experts_per_token=1), Steering(experts_per_token=4)
    steerings = [one, None, four, one]
    lengths = [(6, 5, 1), (3, 0, 3), (9, 4, 2), (2, 1, 1)]
    chunks = [
        make_chunk(*sizes, [0, 1, 2], steering=steering, seed=seed, choice=index)
        for index, (sizes, steering, seed) in enumerate(zip(lengths, steerings, [5, -5, 2**63 + 3, 5], strict=True))
    ]
    routing = build(StepPlan(tuple(chunks)), block_size=4, steering=table, device=CPU).routing
    slot = {steering: table.slots_of([steering])[0] for steering in steerings}
    assert routing.slots.tolist() == [slot[one], 0, 0, 0, slot[four], slot[four], slot[one]]
    assert routing.top_k[routing.slots].tolist() == [1, 2, 2, 2, 4, 4, 1]
    assert routing.positions.tolist() == [5, 0, 1, 2, 4, 5, 1]
    assert (routing.max_top_k, int(routing.num_valid_tokens)) == (4, 7)
    seeds = routing.seeds.tolist()
    assert len(set(seeds)) == 4, "the same seed in another choice is another stream"
    assert seeds[1] == seeds[2] == seeds[3]
    assert seeds[0] == 5
    assert build(StepPlan((chunks[1],)), block_size=4, steering=table, device=CPU).routing.max_top_k == 2
    assert build(StepPlan((chunks[0],)), block_size=4, steering=table, device=CPU).routing.max_top_k == 1


def test_only_chunks_that_reach_the_end_are_sampled() -> None:
    plan = StepPlan((make_chunk(9, 0, 4, [0]), make_chunk(9, 4, 5, [1, 2, 3]), make_chunk(5, 0, 4, [4])))
    assert logits_rows(plan) == [8]
    batch = build(plan, block_size=4, steering=plain_table(), device=CPU)
    assert batch.logits_indices.tolist() == [8]
    nothing = build(StepPlan((make_chunk(9, 0, 4, [0]),)), block_size=4, steering=plain_table(), device=CPU)
    assert nothing.logits_indices.shape == (0,)


@pytest.mark.parametrize(
    ("field", "dtype"),
    [
        ("input_ids", torch.int64),
        ("positions", torch.int64),
        ("slot_mapping", torch.int64),
        ("cu_seqlens", torch.int32),
        ("seq_lens", torch.int32),
        ("block_tables", torch.int32),
        ("logits_indices", torch.int64),
    ],
)
def test_dtypes(field: str, dtype: torch.dtype) -> None:
    tensor = getattr(
        build(StepPlan((make_chunk(9, 0, 4, [0]),)), block_size=4, steering=plain_table(), device=CPU), field
    )
    assert isinstance(tensor, Tensor)
    assert tensor.dtype == dtype


def test_slots_do_not_overflow() -> None:
    batch = build(StepPlan((make_chunk(1, 0, 1, [2**30]),)), block_size=16, steering=plain_table(), device=CPU)
    assert batch.slot_mapping.tolist() == [2**34]


@st.composite
def plans(draw: st.DrawFn, block_size: int) -> StepPlan:
    chunks = []
    for _ in range(draw(st.integers(1, 7))):
        num_tokens = draw(st.integers(1, 23))
        start = draw(st.integers(0, num_tokens - 1))
        length = draw(st.integers(1, num_tokens - start))
        spare = draw(st.integers(0, 2))  # a table may reach further than this step
        num_blocks = -(-(start + length) // block_size) + spare
        table = draw(st.lists(st.integers(0, 999), min_size=num_blocks, max_size=num_blocks))
        chunks.append(make_chunk(num_tokens, start, length, table, first_id=draw(st.integers(0, 9)) * 100))
    return StepPlan(tuple(chunks))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 6))
def test_random_plans_equal_a_loop(data: st.DataObject, block_size: int) -> None:
    plan = data.draw(plans(block_size))
    batch = build(plan, block_size=block_size, steering=plain_table(), device=CPU)
    assert batch.num_tokens == plan.num_tokens
    token = 0
    sampled = []
    for row, chunk in enumerate(plan.chunks):
        sequence = chunk.sequence
        assert batch.cu_seqlens[row] == token
        for position in range(chunk.start, chunk.start + chunk.num_tokens):
            block, offset = sequence.block_table[position // block_size], position % block_size
            assert batch.input_ids[token] == sequence.token_ids[position]
            assert batch.positions[token] == position
            assert divmod(int(batch.slot_mapping[token]), block_size) == (block, offset)
            token += 1
        if position == len(sequence.token_ids) - 1:
            sampled.append(token - 1)
        assert batch.seq_lens[row] == batch.context_lens[row] == position + 1
        assert batch.query_lens[row] == chunk.num_tokens
        table = batch.block_tables[row].tolist()
        assert table[: len(sequence.block_table)] == sequence.block_table
        assert not any(table[len(sequence.block_table) :])
    assert batch.cu_seqlens[-1] == token
    assert batch.cu_seqlens.shape == (len(plan.chunks) + 1,)
    assert batch.logits_indices.tolist() == sampled
