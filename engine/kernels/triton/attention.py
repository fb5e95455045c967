"""Paged attention for decodes and prompt chunks: one kernel, and the reduction of its segments.

A program takes the queries of one block of one sequence with the query heads of one kv head, BLOCK_M rows in all, and
walks over the cached positions in tiles of BLOCK_N with an online softmax (FlashAttention-2, Dao 2023, section 3.1).
With SEGMENTS > 1 each program walks over a share of them and leaves its unnormalised sum, its maximum and its
denominator for the reduction (Flash-Decoding, Dao et al. 2023).

Dimensions as in engine/backends/base.py; GROUP = H / G query heads share a kv head.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Below every score and finite: a row that has seen nothing yet takes part without a difference of infinities.
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _find_sequence(cu_seqlens, num_seqs, block, BLOCK_Q: tl.constexpr):
    """The sequence whose queries block `block` holds: the last b with cu_seqlens[b] // BLOCK_Q + b <= block.

    That leaves each sequence room for its blocks, and the number of all is known from shapes: T // BLOCK_Q + B.
    Example, BLOCK_Q 4, cu_seqlens [0, 1, 10]: sequence 0 starts at block 0, sequence 1 at 1 // 4 + 1 = 1, and its 9
    queries fill blocks 1 to 3, the last of 10 // 4 + 2 = 4.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens + middle) // BLOCK_Q + middle <= block:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _locate(cu_seqlens, num_seqs, block, BLOCK_Q: tl.constexpr, DECODE: tl.constexpr):
    """The queries of a block: sequence, first token, queries of the sequence from there on, queries of the block.

    With DECODE block b is sequence b, if it has one query; else those with one query have no block. A block without
    queries has a number of queries that is not positive.
    """
    if DECODE:
        sequence = block
        token = tl.load(cu_seqlens + sequence)
        left = tl.load(cu_seqlens + sequence + 1) - token
        count = tl.where(left == 1, 1, 0)
    else:
        sequence = _find_sequence(cu_seqlens, num_seqs, block, BLOCK_Q)
        start = tl.load(cu_seqlens + sequence)
        num_queries = tl.load(cu_seqlens + sequence + 1) - start
        first = (block - start // BLOCK_Q - sequence) * BLOCK_Q
        token = start + first
        left = num_queries - first
        count = tl.where(num_queries == 1, 0, tl.minimum(left, BLOCK_Q))
    return sequence, token, left, count


@triton.jit(do_not_specialize=["num_seqs", "table_stride"])
def paged_attention(
    query,  # [T, H, N], rows query_stride apart
    keys,  # [num_blocks, BLOCK_SIZE, G, N]
    values,  # [num_blocks, BLOCK_SIZE, G, N]
    block_tables,  # [B, table_stride] int32
    cu_seqlens,  # [B + 1] int32
    seq_lens,  # [B] int32
    output,  # [T, H, N]; unused with segments
    partial_output,  # [blocks, BLOCK_Q, H, SEGMENTS, N] float32; None without segments, and so are the next two
    partial_max,  # [blocks, BLOCK_Q, H, SEGMENTS] float32, in powers of two
    partial_sum,  # [blocks, BLOCK_Q, H, SEGMENTS] float32
    num_seqs,
    table_stride,
    query_stride,
    score_scale,  # from q * k to powers of two: the scale of the softmax and of the keys, times log2(e)
    value_scale,  # of the output; unused with segments
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # None for none
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DECODE: tl.constexpr,
):
    """Grid (blocks, G, SEGMENTS). Row r of a program is query r // GROUP of its block, query head r % GROUP of its kv
    head; what is left of BLOCK_M stands idle.

    Example, GROUP 3, BLOCK_M 16, BLOCK_Q 5: rows 0 to 2 are the heads of query 0, row 14 is head 2 of query 4.
    """
    # The last queries of a prompt see most: they start first, so that the short ones fill the end.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    segment = tl.program_id(2)
    sequence, token, left, count = _locate(cu_seqlens, num_seqs, block, BLOCK_Q, DECODE)
    if count <= 0:
        return

    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, PADDED_DIM)
    row_query = rows // GROUP
    row_head = kv_head * GROUP + rows % GROUP
    row_used = row_query < count
    dim_used = dims < HEAD_DIM
    row_offset = row_query * query_stride + row_head * HEAD_DIM
    q = tl.load(
        query + token.to(tl.int64) * query_stride + row_offset[:, None] + dims[None, :],
        mask=row_used[:, None] & dim_used[None, :],
        other=0.0,
    )

    # Positions that any query of the block sees: [start, end); this segment's share of their tiles.
    position = tl.load(seq_lens + sequence) - left
    row_position = position + tl.minimum(row_query, count - 1)  # of an idle row too: a row that sees nothing is 0 / 0
    end = position + count
    start = 0
    if WINDOW is not None:
        start = tl.maximum(position - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    if SEGMENTS > 1:
        share = tl.cdiv(tl.cdiv(end - start, BLOCK_N), SEGMENTS) * BLOCK_N
        start += segment * share
        end = tl.minimum(end, start + share)

    maximum = tl.full([BLOCK_M], _LOWEST, tl.float32)
    denominator = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    columns = tl.arange(0, BLOCK_N)
    # Pages are looked up a tile ahead: then the loads of keys and values wait for nothing and are pipelined.
    page = tl.load(table + (start + columns) // BLOCK_SIZE, mask=start + columns < end, other=0)
    for first in range(start, end, BLOCK_N):
        places = first + columns
        place_used = places < end
        slot = page.to(tl.int64) * BLOCK_SIZE + places % BLOCK_SIZE
        page = tl.load(table + (places + BLOCK_N) // BLOCK_SIZE, mask=places + BLOCK_N < end, other=0)
        offset = (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM
        used = place_used[:, None] & dim_used[None, :]
        k = tl.load(keys + offset[:, None] + dims[None, :], mask=used, other=0.0)
        v = tl.load(values + offset[:, None] + dims[None, :], mask=used, other=0.0)

        scores = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        seen = places[None, :] <= row_position[:, None]
        if WINDOW is not None:
            seen = seen & (places[None, :] > row_position[:, None] - WINDOW)
        scores = tl.where(seen, scores * score_scale, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        denominator = denominator * decay + tl.sum(weights, 1)
        total = tl.dot(weights.to(q.dtype), v.to(q.dtype), total * decay[:, None], input_precision="ieee")
        maximum = new_maximum

    if SEGMENTS == 1:
        target = output + token.to(tl.int64) * (NUM_KV_HEADS * GROUP * HEAD_DIM)
        offset = (row_query * (NUM_KV_HEADS * GROUP) + row_head) * HEAD_DIM
        total = total / denominator[:, None] * value_scale
        used = row_used[:, None] & dim_used[None, :]
        tl.store(target + offset[:, None] + dims[None, :], total.to(output.dtype.element_ty), mask=used)
    else:
        place = (block.to(tl.int64) * BLOCK_Q + row_query) * (NUM_KV_HEADS * GROUP) + row_head
        place = place * SEGMENTS + segment
        tl.store(partial_max + place, maximum, mask=row_used)
        tl.store(partial_sum + place, denominator, mask=row_used)
        used = row_used[:, None] & dim_used[None, :]
        tl.store(partial_output + place[:, None] * HEAD_DIM + dims[None, :], total, mask=used)


@triton.jit(do_not_specialize=["num_seqs"])
def reduce_segments(
    partial_output,  # as in paged_attention
    partial_max,
    partial_sum,
    cu_seqlens,  # [B + 1] int32
    output,  # [T, H, N]
    num_seqs,
    value_scale,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    SEGMENTS: tl.constexpr,  # a power of two
    DECODE: tl.constexpr,
):
    """Grid (blocks, H, BLOCK_Q): sum_s 2^(max_s - max) total_s / sum_s 2^(max_s - max) denominator_s of one head."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    row_query = tl.program_id(2)
    _, token, _, count = _locate(cu_seqlens, num_seqs, block, BLOCK_Q, DECODE)
    if row_query >= count:
        return
    dims = tl.arange(0, PADDED_DIM)
    dim_used = dims < HEAD_DIM
    place = (block.to(tl.int64) * BLOCK_Q + row_query) * NUM_HEADS + head
    place = place * SEGMENTS + tl.arange(0, SEGMENTS)
    total = tl.load(partial_output + place[:, None] * HEAD_DIM + dims[None, :], mask=dim_used[None, :], other=0.0)
    maximum = tl.load(partial_max + place)
    decay = tl.exp2(maximum - tl.max(maximum, 0))
    denominator = tl.sum(decay * tl.load(partial_sum + place), 0)
    total = tl.sum(total * decay[:, None], 0) / denominator * value_scale
    target = output + ((token + row_query).to(tl.int64) * NUM_HEADS + head) * HEAD_DIM
    tl.store(target + dims, total.to(output.dtype.element_ty), mask=dim_used)
