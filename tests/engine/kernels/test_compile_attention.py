"""Paged attention compiled for the cards: every tile, at the shapes of Mixtral 8x7B and with heads of other sizes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.backends.base import AttentionShape
from engine.backends.cuda.attention import AttentionTiles, attention_launches
from engine.backends.cuda.card import Card
from engine.backends.cuda.launch import Launch
from engine.batch import Batch
from engine.routing.base import RoutingInputs
from tests.engine.kernels.compile import WARPGROUP_MMA, assert_fits, compiled

FP8 = torch.float8_e4m3fn
SMALLEST_SHARED = 101_376
"""Bytes of a program on cards of 8.6, 8.9 and 12.0, which take the tiles of sm_80."""

MIXTRAL = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, sliding_window=None)
WINDOW = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, sliding_window=4096)
HEAD_64 = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=64, sliding_window=None)
HEAD_80 = AttentionShape(num_heads=18, num_kv_heads=1, head_dim=80, sliding_window=None)
HEAD_6 = AttentionShape(num_heads=9, num_kv_heads=9, head_dim=6, sliding_window=None)
HEAD_256 = AttentionShape(num_heads=16, num_kv_heads=8, head_dim=256, sliding_window=None)


def meta(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def make_batch(query_lens: list[int], context: int) -> Batch:
    """A batch without contents; attention looks at no routing."""
    num_tokens, num_seqs = sum(query_lens), len(query_lens)
    tokens = meta(num_tokens, dtype=torch.int64)
    nothing = meta(1)
    return Batch(
        input_ids=tokens,
        positions=tokens,
        slot_mapping=tokens,
        cu_seqlens=meta(num_seqs + 1),
        seq_lens=meta(num_seqs),
        block_tables=meta(num_seqs, context // 16),
        logits_indices=tokens,
        routing=RoutingInputs(nothing, nothing, nothing, nothing, nothing, nothing, nothing, max_top_k=2),
        query_lens=query_lens,
        context_lens=[context] * num_seqs,
    )


def make_launches(
    query_lens: list[int],
    shape: AttentionShape,
    capability: int,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    context: int = 4096,
) -> list[Launch]:
    tiles = AttentionTiles.of(Card(divmod(capability, 10), 132), shape, dtype)
    batch = make_batch(query_lens, context)
    heads = shape.num_heads + 2 * shape.num_kv_heads
    query = meta(batch.num_tokens, heads, shape.head_dim, dtype=dtype)[:, : shape.num_heads]
    cache = meta(2000, 16, shape.num_kv_heads, shape.head_dim, dtype=cache_dtype or dtype)
    output = meta(batch.num_tokens, shape.num_heads * shape.head_dim, dtype=dtype)
    return list(attention_launches(query, cache, cache, batch, shape, tiles, output))


DECODES, CHUNKS = [1] * 256, [700, 1348]
SHAPES = {
    "mixtral": MIXTRAL,
    "window": WINDOW,
    "head_6": HEAD_6,
    "head_64": HEAD_64,
    "head_80": HEAD_80,
    "head_256": HEAD_256,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_and_chunks_on_hopper(shape: str) -> None:
    for cache_dtype in (torch.bfloat16, FP8):
        (decode,) = make_launches(DECODES, SHAPES[shape], 90, cache_dtype=cache_dtype, context=256)
        assert_fits(compiled(decode, 90), 90, mma="HMMA")
        (chunks,) = make_launches(CHUNKS, SHAPES[shape], 90, cache_dtype=cache_dtype)
        assert_fits(compiled(chunks, 90), 90, mma=WARPGROUP_MMA)


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_and_chunks_on_older_cards(shape: str) -> None:
    for query_lens in (DECODES, CHUNKS):
        (launch,) = make_launches(query_lens, SHAPES[shape], 80, context=256)
        program = compiled(launch, 80)
        assert_fits(program, 80, mma="HMMA")
        assert program.shared_bytes <= SMALLEST_SHARED, program


@pytest.mark.parametrize("capability", [80, 90])
def test_float16(capability: int) -> None:
    for query_lens in (DECODES, CHUNKS):
        (launch,) = make_launches(query_lens, MIXTRAL, capability, torch.float16, context=256)
        assert_fits(compiled(launch, capability), capability, mma=f"HMMA|{WARPGROUP_MMA}")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("shape", ["head_64", "mixtral", "head_256"])
def test_float32(shape: str, capability: int) -> None:
    for query_lens in (DECODES, CHUNKS):
        (launch,) = make_launches(query_lens, SHAPES[shape], capability, torch.float32, context=256)
        program = compiled(launch, capability)
        assert_fits(program, capability)
        assert program.shared_bytes <= SMALLEST_SHARED, program


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("query_lens", [[1], [128]], ids=["decode", "chunk"])
def test_segments_and_their_reduction(query_lens: list[int], capability: int) -> None:
    """As many as there can be for a decode: the reduction has them all at once."""
    attend, reduce = make_launches(query_lens, MIXTRAL, capability, context=32_768)
    assert attend.constexprs["SEGMENTS"] == reduce.constexprs["SEGMENTS"] == (64 if query_lens == [1] else 4)
    assert_fits(compiled(attend, capability), capability, mma=f"HMMA|{WARPGROUP_MMA}")
    assert_fits(compiled(reduce, capability), capability)
