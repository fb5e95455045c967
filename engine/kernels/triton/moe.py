"""The experts: gate and up products with SiLU, the down product with the routing weight, the sum over the choices.

A program of the two products takes BLOCK_M assignments of one expert and BLOCK_N output columns. The product is
computed transposed, weights [BLOCK_N, BLOCK_K] times activations [BLOCK_K, BLOCK_M]: a decode has few rows for an
expert, and Hopper's wgmma wants 64 on its first side. That side is also the one that may come from registers, where
8-bit weights are widened. An assignment t*K + k is also its row in everything between the products.

Dimensions as in engine/backends/base.py; A = T*K assignments. Weights have the dtype of the activations, or 8 bits
with a float32 scale for each output column, by which the float32 sum is multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(program, num_blocks, NUM_COLUMNS: tl.constexpr, GROUP_M: tl.constexpr):
    """The block of rows and of columns that a program computes: GROUP_M blocks of rows take turns at a column, so that
    what runs together shares weights and activations in the L2 cache.

    Example, 3 blocks of rows, 2 of columns, GROUP_M 2: (0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1).
    """
    size = GROUP_M * NUM_COLUMNS
    first = program // size * GROUP_M
    height = tl.minimum(num_blocks - first, GROUP_M)
    within = program % size
    return first + within % height, within // height


@triton.jit
def _load_weights(pointers, offsets, left, EVEN: tl.constexpr, dtype: tl.constexpr):
    """A tile of weights in `dtype`; zeros from column `left` on, unless EVEN says that there are none."""
    weights = tl.load(pointers) if EVEN else tl.load(pointers, mask=offsets < left, other=0.0)
    if weights.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        # Exact, and by instructions four times as fast as those of the direct conversion.
        weights = weights.to(tl.float16).to(tl.float32)
    return weights.to(dtype)


@triton.jit
def _store_columns(pointers, values, valid, columns, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Store the valid rows, up to column N, unless BLOCK_N divides it."""
    if N % BLOCK_N == 0:
        tl.store(pointers, values, mask=valid[:, None])
    else:
        tl.store(pointers, values, mask=valid[:, None] & (columns < N)[None, :])


@triton.jit(do_not_specialize=["num_assignments", "num_choices", "num_blocks"])
def up_kernel(
    x,  # [T, D]
    w13,  # [E, 2F, D]: rows of the gate, then of up
    scale,  # [E, 2F] or None
    sorted_ids,  # [num_blocks * BLOCK_M]
    block_experts,  # [num_blocks]
    middle,  # [A, F]
    num_assignments,
    num_choices,
    num_blocks,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """middle = silu(gate) * up, of the activations' dtype. Grid: num_blocks * cdiv(F, BLOCK_N)."""
    block, column = _place(tl.program_id(0), num_blocks, tl.cdiv(F, BLOCK_N), GROUP_M)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    ids = tl.load(sorted_ids + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = ids < num_assignments
    # Padding reads the block's first row, and columns from F on the last one: nothing in the loop needs a mask.
    first = tl.load(sorted_ids + block * BLOCK_M)
    tokens = (tl.where(valid, ids, first) // num_choices).to(tl.int64)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = expert * (2 * F) + tl.minimum(columns, F - 1)
    offsets = tl.arange(0, BLOCK_K)[None, :]
    x_tile = x + tokens[:, None] * D + offsets
    gate_tile = w13 + rows[:, None] * D + offsets
    up_tile = gate_tile + F * D
    gate = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    EVEN: tl.constexpr = D % BLOCK_K == 0
    for start in range(0, D, BLOCK_K):
        a = tl.load(x_tile) if EVEN else tl.load(x_tile, mask=offsets < D - start, other=0.0)
        gate_weights = _load_weights(gate_tile, offsets, D - start, EVEN, a.dtype)
        gate = tl.dot(gate_weights, a.T, gate, input_precision="ieee")
        up_weights = _load_weights(up_tile, offsets, D - start, EVEN, a.dtype)
        up = tl.dot(up_weights, a.T, up, input_precision="ieee")
        x_tile += BLOCK_K
        gate_tile += BLOCK_K
        up_tile += BLOCK_K
    if scale is not None:
        gate *= tl.load(scale + rows)[:, None]
        up *= tl.load(scale + rows + F)[:, None]
    result = (gate / (1 + tl.exp(-gate)) * up).to(middle.dtype.element_ty).T
    output = middle + ids.to(tl.int64)[:, None] * F + columns[None, :]
    _store_columns(output, result, valid, columns, F, BLOCK_N)


@triton.jit(do_not_specialize=["num_assignments", "num_blocks"])
def down_kernel(
    middle,  # [A, F]
    w2,  # [E, D, F]
    scale,  # [E, D] or None
    routing_weights,  # [A] float32
    sorted_ids,  # [num_blocks * BLOCK_M]
    block_experts,  # [num_blocks]
    grouped,  # [A, D]
    num_assignments,
    num_blocks,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grouped = routing weight * (w2 @ middle), of the activations' dtype. Grid: num_blocks * cdiv(D, BLOCK_N)."""
    block, column = _place(tl.program_id(0), num_blocks, tl.cdiv(D, BLOCK_N), GROUP_M)
    expert = tl.load(block_experts + block).to(tl.int64)
    if expert < 0:
        return
    ids = tl.load(sorted_ids + block * BLOCK_M + tl.arange(0, BLOCK_M))
    valid = ids < num_assignments
    # As above. Row 0 would not do: if its assignment has no expert, nothing was ever written there.
    assignments = tl.where(valid, ids, tl.load(sorted_ids + block * BLOCK_M)).to(tl.int64)
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = expert * D + tl.minimum(columns, D - 1)
    offsets = tl.arange(0, BLOCK_K)[None, :]
    middle_tile = middle + assignments[:, None] * F + offsets
    weights_tile = w2 + rows[:, None] * F + offsets
    product = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    EVEN: tl.constexpr = F % BLOCK_K == 0
    for start in range(0, F, BLOCK_K):
        a = tl.load(middle_tile) if EVEN else tl.load(middle_tile, mask=offsets < F - start, other=0.0)
        weights = _load_weights(weights_tile, offsets, F - start, EVEN, a.dtype)
        product = tl.dot(weights, a.T, product, input_precision="ieee")
        middle_tile += BLOCK_K
        weights_tile += BLOCK_K
    if scale is not None:
        product *= tl.load(scale + rows)[:, None]
    product *= tl.load(routing_weights + assignments)[None, :]
    result = product.to(grouped.dtype.element_ty).T
    output = grouped + assignments[:, None] * D + columns[None, :]
    _store_columns(output, result, valid, columns, D, BLOCK_N)


@triton.jit(do_not_specialize=["num_choices"])
def sum_kernel(
    grouped,  # [A, D], or [P, D] with places
    places,  # [A]: the row of `grouped` that an assignment has; None: its own number
    expert_ids,  # [A], -1: no expert, and a row that is not read
    residual,  # [T, D]
    num_choices,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """residual += the sum over a token's choices, added up in their order in float32. Grid: T, cdiv(D, BLOCK_N)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < D
    total = tl.zeros((BLOCK_N,), tl.float32)
    for choice in range(num_choices):
        assignment = token * num_choices + choice
        used = tl.load(expert_ids + assignment) >= 0
        row = assignment if places is None else tl.load(places + assignment).to(tl.int64)
        total += tl.load(grouped + row * D + columns, mask=inside & used, other=0.0).to(tl.float32)
    output = residual + token * D + columns
    total += tl.load(output, mask=inside).to(tl.float32)
    tl.store(output, total.to(residual.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_assignments"])
def silu_mul_kernel(
    gate_up,  # [P, 2F]
    routing_weights,  # [A] float32
    sorted_ids,  # [P]
    middle,  # [P, F]
    scale,  # [P] float32, for a `middle` of float8 e4m3; else None
    num_assignments,
    F: tl.constexpr,
    LARGEST: tl.constexpr,  # of a row of e4m3, whose largest value it is
    TINY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """middle = routing weight * silu(gate) * up of each row of a grouped product, the weight in its scale if it has
    one. Rows that are padding are left as they are. Grid: P.
    """
    place = tl.program_id(0).to(tl.int64)
    assignment = tl.load(sorted_ids + place)
    if assignment >= num_assignments:
        return
    factor = tl.load(routing_weights + assignment)
    offsets = tl.arange(0, BLOCK_N)
    source = gate_up + place * (2 * F)
    if scale is not None:
        largest = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, F, BLOCK_N):
            largest = tl.maximum(largest, tl.abs(_silu_mul(source, start + offsets, F)))
        row_scale = tl.maximum(tl.max(largest), TINY) / LARGEST
        tl.store(scale + place, row_scale * factor)
        factor = 1 / row_scale
    for start in range(0, F, BLOCK_N):
        columns = start + offsets
        result = _silu_mul(source, columns, F) * factor
        tl.store(middle + place * F + columns, result.to(middle.dtype.element_ty), mask=columns < F)


@triton.jit
def _silu_mul(source, columns, F: tl.constexpr):
    """silu(gate) * up in float32, 0 from column F on."""
    gate = tl.load(source + columns, mask=columns < F, other=0.0).to(tl.float32)
    up = tl.load(source + F + columns, mask=columns < F, other=0.0).to(tl.float32)
    return gate / (1 + tl.exp(-gate)) * up
