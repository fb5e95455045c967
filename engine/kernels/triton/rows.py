"""Row by row: residual add and RMSNorm; rotary positions and the write into the cache.

Arithmetic is float32. A result is rounded to the dtype of its tensor where torch's single operations would round it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_rms_norm(
    x,  # [T, D]
    y,  # [T, D], added to x; None: x stays as it is
    rows,  # [R] int64, the rows of x that are wanted; None: all
    weight,  # [D]
    normed,  # [R, D], written
    eps,
    HIDDEN_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least HIDDEN_SIZE
):
    """normed = x / rms(x) * weight (Zhang & Sennrich 2019), after x += y. Grid (R,): a program has a row."""
    target = tl.program_id(0).to(tl.int64)
    row = target
    if rows is not None:
        row = tl.load(rows + target)
    columns = tl.arange(0, BLOCK)
    used = columns < HIDDEN_SIZE
    at = row * HIDDEN_SIZE + columns
    values = tl.load(x + at, used, 0.0)
    scale = tl.load(weight + columns, used, 0.0).to(tl.float32)  # before the reduction, which waits for all warps
    if y is not None:
        values = (values.to(tl.float32) + tl.load(y + at, used, 0.0).to(tl.float32)).to(values.dtype)
        tl.store(x + at, values, used)
    wide = values.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / HIDDEN_SIZE + eps)
    result = wide.to(values.dtype).to(tl.float32) * scale
    tl.store(normed + target * HIDDEN_SIZE + columns, result.to(values.dtype), used)


@triton.jit
def rotary_write(
    qkv,  # [T, (H + 2G) * N]: query, key and value heads; the query heads are rotated in place
    cos,  # [T, N / 2] float32, of position * frequency
    sin,  # [T, N / 2] float32
    slot_mapping,  # [T] int64; -1: no keys and values to write
    keys,  # [num_blocks * block_size, G, N], written
    values,  # likewise
    key_factor,  # keys and values are multiplied by these and clamped (8 bits); None: written as they are
    value_factor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,  # powers of two, at least NUM_HEADS / NUM_KV_HEADS and HEAD_DIM / 2
    HALF: tl.constexpr,
):
    """Rotate the two halves of every head (Su et al. 2021) and put keys and values into their slots. Grid (T, G): a
    program has the query heads of one kv head, and its key and value.

    Example, H 4, G 2, N 8: program (t, 1) has the query heads 2 and 3, at 16 and 24 of row t, the key at 32 + 8 and
    the value at 48 + 8.
    """
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    half: tl.constexpr = HEAD_DIM // 2
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    dims = tl.arange(0, HALF)
    dim_used = dims < half
    c = tl.load(cos + token * half + dims, dim_used, 0.0)
    s = tl.load(sin + token * half + dims, dim_used, 0.0)
    row = qkv + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)

    heads = tl.arange(0, HEADS)
    query = row + (kv_head * group + heads)[:, None] * HEAD_DIM + dims[None, :]
    query_used = (heads < group)[:, None] & dim_used[None, :]
    first, second = _rotate(query, query_used, c[None, :], s[None, :], half)
    tl.store(query, first, query_used)
    tl.store(query + half, second, query_used)

    slot = tl.load(slot_mapping + token)
    written = dim_used & (slot >= 0)
    place = (slot * NUM_KV_HEADS + kv_head) * HEAD_DIM + dims
    key = row + (NUM_HEADS + kv_head) * HEAD_DIM + dims
    key_first, key_second = _rotate(key, dim_used, c, s, half)
    _write(keys + place, key_first, key_factor, written)
    _write(keys + place + half, key_second, key_factor, written)
    value = key + NUM_KV_HEADS * HEAD_DIM
    _write(values + place, tl.load(value, dim_used, 0.0), value_factor, written)
    _write(values + place + half, tl.load(value + half, dim_used, 0.0), value_factor, written)


@triton.jit
def _rotate(head, used, c, s, half: tl.constexpr):
    """The halves of a head, rotated, in its dtype."""
    narrow_first = tl.load(head, used, 0.0)
    narrow_second = tl.load(head + half, used, 0.0)
    first = narrow_first.to(tl.float32)
    second = narrow_second.to(tl.float32)
    return (first * c - second * s).to(narrow_first.dtype), (second * c + first * s).to(narrow_first.dtype)


@triton.jit
def _write(place, x, factor, used):
    """Into the cache, with 0 for what is not finite: a masked position still takes part in attention, times zero."""
    wide = x.to(tl.float32)
    wide = tl.where(tl.abs(wide) < float("inf"), wide, 0.0)
    if factor is not None:
        largest: tl.constexpr = 448.0  # of e4m3
        wide = tl.clamp(wide * factor, -largest, largest)
    tl.store(place, wide.to(place.dtype.element_ty), used)
