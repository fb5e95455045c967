"""Paged attention on a GPU: its tiles, its segments, and the launches of a step.

Sequences with one query and those with more are served by launches of their own, of the same kernel: a decode is bound
by memory and wants few rows and many programs, a chunk of a prompt is bound by products and wants many rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from engine.backends.base import AttentionShape
from engine.backends.cuda.card import Card
from engine.backends.cuda.launch import Launch
from engine.batch import Batch
from engine.kernels.triton.attention import paged_attention, reduce_segments

MAX_HEAD_DIM = 256

_MIN_SEGMENT = 256
"""Cached positions that are worth a program of their own."""

_MAX_SEGMENTS = 64


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """A program takes block_m rows (queries times the heads of a kv head) and block_n cached positions at a time.

    Contexts are cut into segments until there are `programs_per_sm` programs for each multiprocessor.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


# By padded head_dim, for 16-bit queries. Two tiles of keys and values are on their way while a third is used.
_DECODE = {
    64: AttentionTile(16, 128, 4, 3, programs_per_sm=4),
    128: AttentionTile(16, 64, 4, 3, programs_per_sm=4),
    256: AttentionTile(16, 32, 4, 3, programs_per_sm=4),
}
_CHUNKS = {
    64: AttentionTile(128, 64, 8, 3, programs_per_sm=1),
    128: AttentionTile(128, 64, 8, 3, programs_per_sm=1),
    256: AttentionTile(64, 32, 8, 2, programs_per_sm=1),
}
_CHUNKS_HOPPER = _CHUNKS | {256: AttentionTile(64, 64, 8, 2, programs_per_sm=1)}
# Products in float32 have no tensor cores. Larger tiles spill.
_FLOAT32 = AttentionTile(16, 16, 8, 2, programs_per_sm=4)


@dataclass(frozen=True, slots=True)
class AttentionTiles:
    """The tiles of a model on a card, and how many multiprocessors that has."""

    decode: AttentionTile
    chunks: AttentionTile
    num_sms: int

    @classmethod
    def of(cls, card: Card, shape: AttentionShape, dtype: torch.dtype) -> AttentionTiles:
        """For queries of `dtype`."""
        assert shape.head_dim <= MAX_HEAD_DIM
        if dtype == torch.float32:
            return cls(_FLOAT32, _FLOAT32, card.num_sms)
        head_dim = max(64, next_power_of_2(shape.head_dim))
        chunks = _CHUNKS_HOPPER if card.capability[0] == 9 else _CHUNKS
        return cls(_DECODE[head_dim], chunks[head_dim], card.num_sms)


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    shape: AttentionShape,
    tiles: AttentionTiles,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Causal attention over the cache, this step's keys and values included: query [T, H, N] -> [T, H * N].

    The query's tokens may lie apart, its heads not. Keys and values [num_blocks, block_size, G, N] of one layer, in the
    query's dtype, or e4m3 of what was divided by `k_scale` and `v_scale`. What lies in the cache is finite.

    Rows from cu_seqlens[-1] on are padding and are not written. The lists of `batch` may be upper bounds, as they are
    when a graph is captured: sequences of one query may turn out to have none, and contexts to be shorter.
    """
    output = query.new_empty(query.shape[0], shape.num_heads * shape.head_dim)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    for launch in attention_launches(query, keys, values, batch, shape, tiles, output, **scales):
        launch.run()
    return output


def attention_launches(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: Batch,
    shape: AttentionShape,
    tiles: AttentionTiles,
    output: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Iterator[Launch]:
    """See `attention`: for the decodes and for the chunks, where there are any, one launch, or two with segments."""
    assert keys.is_contiguous()
    assert values.is_contiguous()
    assert query.stride()[1:] == (shape.head_dim, 1)
    num_seqs, group = batch.seq_lens.shape[0], shape.num_heads // shape.num_kv_heads
    head = {"HEAD_DIM": shape.head_dim, "PADDED_DIM": max(16, next_power_of_2(shape.head_dim))}
    for cut in _cuts(batch, shape, tiles):
        partial: tuple[Tensor | None, ...] = (None, None, None)
        if cut.segments > 1:
            places = (cut.num_blocks, cut.block_q, shape.num_heads, cut.segments)
            sizes = ((*places, shape.head_dim), places, places)
            partial = tuple(torch.empty(size, dtype=torch.float32, device=query.device) for size in sizes)
        shared = {
            **dict(zip(("partial_output", "partial_max", "partial_sum"), partial, strict=True)),
            "cu_seqlens": batch.cu_seqlens,
            "output": output,
            "num_seqs": num_seqs,
            "value_scale": v_scale,
        }
        choice = {**head, "BLOCK_Q": cut.block_q, "SEGMENTS": cut.segments, "DECODE": cut.decode}
        yield Launch(
            paged_attention,
            (cut.num_blocks, shape.num_kv_heads, cut.segments),
            {
                **shared,
                "query": query,
                "keys": keys,
                "values": values,
                "block_tables": batch.block_tables,
                "seq_lens": batch.seq_lens,
                "table_stride": batch.block_tables.stride(0),
                "query_stride": query.stride(0),
                "score_scale": shape.scale * k_scale * math.log2(math.e),
            },
            {
                **choice,
                "NUM_KV_HEADS": shape.num_kv_heads,
                "GROUP": group,
                "BLOCK_SIZE": keys.shape[1],
                "WINDOW": shape.sliding_window,
                "BLOCK_M": cut.tile.block_m,
                "BLOCK_N": cut.tile.block_n,
            },
            num_warps=cut.tile.num_warps,
            num_stages=cut.tile.num_stages,
        )
        if cut.segments > 1:
            grid = (cut.num_blocks, shape.num_heads, cut.block_q)
            constexprs = {**choice, "NUM_HEADS": shape.num_heads}
            yield Launch(reduce_segments, grid, shared, constexprs, num_warps=4, num_stages=1)


@dataclass(frozen=True, slots=True)
class _Cut:
    """How decodes or chunks are cut into programs: `num_blocks` of `block_q` queries, times kv heads and segments."""

    tile: AttentionTile
    decode: bool
    block_q: int
    num_blocks: int
    segments: int


def _cuts(batch: Batch, shape: AttentionShape, tiles: AttentionTiles) -> Iterator[_Cut]:
    num_seqs, group = batch.seq_lens.shape[0], shape.num_heads // shape.num_kv_heads
    for decode, tile in ((True, tiles.decode), (False, tiles.chunks)):
        lengths = zip(batch.query_lens, batch.context_lens, strict=True)
        longest = max((context for queries, context in lengths if queries and (queries == 1) == decode), default=0)
        if not longest:
            continue
        block_m = max(tile.block_m, next_power_of_2(group))
        block_q = 1 if decode else block_m // group
        num_blocks = num_seqs if decode else batch.num_tokens // block_q + num_seqs
        if shape.sliding_window is not None:
            longest = min(longest, shape.sliding_window + block_q - 1)
        segments = num_segments(num_blocks * shape.num_kv_heads, longest, tile.programs_per_sm * tiles.num_sms)
        yield _Cut(replace(tile, block_m=block_m), decode, block_q, num_blocks, segments)


def num_segments(num_programs: int, longest: int, wanted: int) -> int:
    """Into how many segments, a power of two, to cut contexts of up to `longest` positions, to come to `wanted`
    programs.

    Example: 8 programs of 5,000 positions and 528 wanted: 66 segments would do it, but 5000 // 256 = 19 are worth
    their while, so 16.
    """
    enough: int = next_power_of_2(cdiv(wanted, num_programs))
    worth = max(1, longest // _MIN_SEGMENT)
    return min(enough, 1 << worth.bit_length() - 1, _MAX_SEGMENTS)
