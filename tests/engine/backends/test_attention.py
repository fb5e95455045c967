"""Paged attention of the torch backend against the reference, and of the reference against a dense one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.backends import torch as torch_backend
from engine.backends.base import AttentionShape, KVCache, LayerBackend
from engine.backends.reference import ReferenceBackend
from engine.backends.torch import TorchBackend
from engine.batch import Batch, build
from engine.scheduler import Chunk, StepPlan
from tests.engine.routing.inputs import plain_table
from tests.engine.sequences import make_sequence

CPU = torch.device("cpu")
BLOCK_SIZE = 4
LAYER, NUM_LAYERS = 1, 3
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
GARBAGE = {torch.float32: 1e4, torch.float16: 1e2, torch.bfloat16: 1e2}

SHAPES = {
    "gqa2": (4, 2, 8, None),
    "mqa": (6, 1, 10, None),
    "mha": (5, 5, 6, None),
    "window7": (8, 2, 16, 7),
    "window_of_one": (3, 3, 2, 1),
    "window_of_one_block": (4, 2, 8, BLOCK_SIZE),
    "window_beyond_everything": (4, 1, 4, 1000),
}
# (tokens in the cache already, tokens of this step) of every sequence
BATCHES = {
    "one_decode": [(5, 1)],
    "first_token": [(0, 1)],
    "one_prompt": [(0, 9)],
    "full_blocks": [(BLOCK_SIZE, BLOCK_SIZE), (2 * BLOCK_SIZE - 1, 1), (0, BLOCK_SIZE)],
    "mixed": [(13, 1), (0, 7), (9, 4), (2, 1), (0, 1), (4, 2), (31, 1), (0, 3)],
    "ragged_decodes": [(1, 1), (60, 1), (0, 1), (15, 1), (16, 1), (33, 1), (3, 1), (60, 1), (7, 1)],
}


def make_shape(name: str) -> AttentionShape:
    num_heads, num_kv_heads, head_dim, window = SHAPES[name]
    return AttentionShape(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=window)


def make_batch(sizes: list[tuple[int, int]], generator: torch.Generator) -> tuple[Batch, Batch, int]:
    """A batch of those sizes, one that fills the cache with what came before, and how many blocks there are.

    Block tables are scrambled, and every block but the last ones of each sequence is used.
    """
    num_blocks = sum(-(-(start + length) // BLOCK_SIZE) for start, length in sizes) + 2
    free = torch.randperm(num_blocks, generator=generator).tolist()
    chunks, history = [], []
    for start, length in sizes:
        sequence = make_sequence(list(range(start + length)))
        sequence.block_table = [free.pop() for _ in range(-(-(start + length) // BLOCK_SIZE))]
        chunks.append(Chunk(sequence, start, length))
        history.append(Chunk(sequence, 0, max(start, 1)))
    batch, before = (
        build(StepPlan(tuple(plan)), block_size=BLOCK_SIZE, steering=plain_table(), device=CPU)
        for plan in (chunks, history)
    )
    return batch, before, num_blocks


@dataclass(frozen=True)
class Case:
    """One call of attention, with the keys and values that are to be in the cache."""

    batch: Batch
    history: Batch
    num_blocks: int
    shape: AttentionShape
    dtype: torch.dtype
    query: Tensor
    past: tuple[Tensor, Tensor]
    present: tuple[Tensor, Tensor]

    def run(self, backend: LayerBackend) -> tuple[Tensor, KVCache]:
        cache = backend.new_kv_cache(NUM_LAYERS, self.num_blocks, BLOCK_SIZE, self.shape)
        cache.keys.fill_(GARBAGE[self.dtype])
        cache.values.fill_(-GARBAGE[self.dtype])
        backend.write_kv(cache, LAYER, *self.past, self.history.slot_mapping)
        backend.write_kv(cache, LAYER, *self.present, self.batch.slot_mapping)
        return backend.attention(self.query.clone(), cache, LAYER, self.batch, self.shape), cache


def make_case(sizes: list[tuple[int, int]], shape: AttentionShape, dtype: torch.dtype, *, seed: int = 0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    batch, history, num_blocks = make_batch(sizes, generator)

    def normal(num_tokens: int, num_heads: int) -> Tensor:
        return torch.randn(num_tokens, num_heads, shape.head_dim, generator=generator).to(dtype)

    def keys_and_values(num_tokens: int) -> tuple[Tensor, Tensor]:
        return normal(num_tokens, shape.num_kv_heads), normal(num_tokens, shape.num_kv_heads)

    query = 2 * normal(batch.num_tokens, shape.num_heads)
    past, present = keys_and_values(history.num_tokens), keys_and_values(batch.num_tokens)
    return Case(batch, history, num_blocks, shape, dtype, query, past, present)


def check(case: Case) -> None:
    actual, actual_cache = case.run(TorchBackend([], device=CPU, dtype=case.dtype))
    expected, expected_cache = case.run(ReferenceBackend([], device=CPU, dtype=case.dtype))
    assert torch.equal(actual_cache.keys, expected_cache.keys)
    assert torch.equal(actual_cache.values, expected_cache.values)
    assert actual.shape == (case.batch.num_tokens, case.shape.num_heads * case.shape.head_dim)
    assert actual.dtype == case.dtype
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("sizes", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape: str, sizes: str) -> None:
    check(make_case(BATCHES[sizes], make_shape(shape), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["gqa2", "window7"])
def test_equals_the_reference_in_half_precision(shape: str, dtype: torch.dtype) -> None:
    for sizes in ("mixed", "ragged_decodes"):
        check(make_case(BATCHES[sizes], make_shape(shape), dtype))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.one_of(st.just(1), st.integers(1, 6))), min_size=1, max_size=7),
    st.sampled_from(sorted(SHAPES)),
    st.integers(1, 100),
)
def test_random_batches_equal_the_reference(sizes: list[tuple[int, int]], shape: str, limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "_GATHER_TOKENS", limit)
        check(make_case(sizes, make_shape(shape), torch.float32, seed=limit))


@pytest.mark.parametrize("limit", [1, 16, 64, 130, 100_000])
def test_decodes_are_gathered_in_groups_of_bounded_size(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "_GATHER_TOKENS", limit)
    for sizes in ("mixed", "ragged_decodes"):
        case = make_case(BATCHES[sizes], make_shape("gqa2"), torch.float32)
        groups = list(torch_backend._decode_groups(case.batch, BLOCK_SIZE))
        decodes = [row for row, (_, length) in enumerate(BATCHES[sizes]) if length == 1]
        assert sorted(row for group in groups for row in group) == decodes
        for group in groups:
            longest = max(-(-case.batch.context_lens[row] // BLOCK_SIZE) * BLOCK_SIZE for row in group)
            assert len(group) == 1 or len(group) * longest <= limit
        assert sizes == "mixed" or (len(groups) == 1) == (limit == 100_000)
        check(case)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_equals_dense_attention(shape: str) -> None:
    """One sequence without pages: torch's attention over the keys as they are, heads repeated, causal mask."""
    start, length = 11, 6
    case = make_case([(start, length)], make_shape(shape), torch.float32)
    actual, _ = case.run(ReferenceBackend([], device=CPU, dtype=torch.float32))
    repeats = case.shape.num_heads // case.shape.num_kv_heads
    keys, values = (
        torch.cat(pair).repeat_interleave(repeats, dim=1).transpose(0, 1)
        for pair in zip(case.past, case.present, strict=True)
    )
    mask = torch.ones(length, start + length, dtype=torch.bool).tril(start)
    if case.shape.sliding_window is not None:
        mask &= torch.ones(length, start + length, dtype=torch.bool).triu(start - case.shape.sliding_window + 1)
    expected = F.scaled_dot_product_attention(case.query.transpose(0, 1), keys, values, attn_mask=mask)
    torch.testing.assert_close(actual, expected.transpose(0, 1).flatten(1), rtol=1e-5, atol=1e-5)


def test_other_layers_are_left_alone() -> None:
    case = make_case(BATCHES["mixed"], make_shape("gqa2"), torch.float32)
    for backend in (TorchBackend([], device=CPU, dtype=case.dtype), ReferenceBackend([], device=CPU, dtype=case.dtype)):
        _, cache = case.run(backend)
        for layer in (0, 2):
            assert (cache.keys[layer] == GARBAGE[case.dtype]).all()
            assert (cache.values[layer] == -GARBAGE[case.dtype]).all()


def test_a_new_cache_is_finite() -> None:
    shape = make_shape("gqa2")
    for backend in (
        TorchBackend([], device=CPU, dtype=torch.float16),
        ReferenceBackend([], device=CPU, dtype=torch.half),
    ):
        cache = backend.new_kv_cache(3, 5, 7, shape)
        assert cache.keys.shape == cache.values.shape == (3, 5, 7, 2, 8)
        assert (cache.num_blocks, cache.block_size) == (5, 7)
        assert cache.keys.dtype == torch.float16
        assert cache.keys.isfinite().all()
        assert cache.values.isfinite().all()
        assert cache.keys.data_ptr() != cache.values.data_ptr()


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_what_a_broken_sequence_left_behind_reaches_nobody_else(garbage: float) -> None:
    """Half precision overflows now and then. Its blocks are used again, and padding reads block 0."""
    case = make_case(BATCHES["mixed"], make_shape("gqa2"), torch.float32)
    backend = TorchBackend([], device=CPU, dtype=case.dtype)
    expected, _ = case.run(backend)
    cache = backend.new_kv_cache(NUM_LAYERS, case.num_blocks, BLOCK_SIZE, case.shape)
    every_slot = torch.arange(case.num_blocks * BLOCK_SIZE)
    broken = torch.full((len(every_slot), case.shape.num_kv_heads, case.shape.head_dim), garbage)
    backend.write_kv(cache, LAYER, broken, broken, every_slot)
    backend.write_kv(cache, LAYER, *case.past, case.history.slot_mapping)
    backend.write_kv(cache, LAYER, *case.present, case.batch.slot_mapping)
    actual = backend.attention(case.query, cache, LAYER, case.batch, case.shape)
    torch.testing.assert_close(actual, expected)


def test_the_window_is_counted_in_tokens_and_includes_the_query() -> None:
    """With a window of one, a query sees its own value and nothing else."""
    case = make_case(BATCHES["mixed"], replace(make_shape("mha"), sliding_window=1), torch.float32)
    for backend in (TorchBackend([], device=CPU, dtype=case.dtype), ReferenceBackend([], device=CPU, dtype=case.dtype)):
        output, _ = case.run(backend)
        torch.testing.assert_close(output, case.present[1].flatten(1))
