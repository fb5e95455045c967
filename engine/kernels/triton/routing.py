"""Routing and grouping, each by one program.

T rows, E experts padded to EXPERTS (a power of two), K places a row. Loops over T and T*K take ROWS and PLACES at a
time, so that batches of many sizes run the same code.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layer", "num_rows", "num_choices", "record_rows", "num_blocks"])
def route_kernel(
    logits,  # [T, E]
    num_valid_rows,  # [] int64
    slots,  # [T] int64
    top_k,  # [S] int64
    min_p,  # [S] float32
    forbidden,  # [S, L, E] bool
    expert_ids,  # [T, K] int32, written
    weights,  # [T, K] float32, written
    record_logits,  # [L, record_rows, E] float32, written in this layer; None: no record
    record_expert_ids,  # [L, record_rows, E] int32, likewise, in the first K columns
    record_chosen_ids,  # [L, record_rows, E] int32, likewise
    record_weights,  # [L, record_rows, E] float32, likewise
    sorted_ids,  # [num_blocks * BLOCK_M] int32, written
    block_experts,  # [num_blocks] int32, written
    layer,
    num_rows,
    num_choices,
    record_rows,
    num_blocks,
    NUM_LAYERS: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """`TopKSoftmax` without a capacity (engine/routing/topk_softmax.py); then the record's rows and the blocks.

    A place is filled in each round, by the best expert that has none yet. Rows without a softmax (a gate that is NaN or
    +inf, no expert allowed) and rows from num_valid_rows on have no experts.
    """
    num_assignments = num_rows * num_choices
    _fill(sorted_ids, num_assignments, num_blocks * BLOCK_M)
    if record_logits is not None:
        layers_before = layer.to(tl.int64) * record_rows * NUM_EXPERTS
        record_logits += layers_before
        record_expert_ids += layers_before
        record_chosen_ids += layers_before
        record_weights += layers_before
    num_valid = tl.load(num_valid_rows).to(tl.int32)
    experts = tl.arange(0, EXPERTS)[None, :]
    for start in range(0, num_rows, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = rows < num_rows
        valid = rows < num_valid
        slot = tl.load(slots + rows, valid, 0)
        most = tl.load(top_k + slot)
        at = rows * NUM_EXPERTS
        is_expert = experts < NUM_EXPERTS
        allowed = valid[:, None] & is_expert
        allowed &= tl.load(forbidden + (slot[:, None] * NUM_LAYERS + layer) * NUM_EXPERTS + experts, allowed, 1) == 0
        gates = tl.load(logits + at[:, None] + experts, inside[:, None] & is_expert, 0.0).to(tl.float32)
        if record_logits is not None:
            tl.store(record_logits + at[:, None] + experts, gates, inside[:, None] & is_expert)

        gates = tl.where(allowed, gates, -float("inf"))
        highest = tl.max(gates, 1)
        highest = tl.where((highest > -float("inf")) & (highest < float("inf")), highest, 0.0)
        numerator = tl.exp(gates - highest[:, None])
        total = tl.sum(numerator, 1)
        has_softmax = (total > 0) & (total < float("inf"))
        probability = tl.div_rn(numerator, tl.where(has_softmax, total, 1.0)[:, None])
        probability = tl.where(allowed & has_softmax[:, None], probability, -1.0)

        least = tl.maximum(tl.load(min_p + slot) * tl.max(probability, 1), 0.0)
        place = tl.full([ROWS, EXPERTS], -1, tl.int32)
        for k in range(num_choices):
            best, expert = tl.max(tl.where(place < 0, probability, -1.0), 1, return_indices=True)
            used = (k < most) & (best >= least)
            place = tl.where(used[:, None] & (experts == expert[:, None]), k, place)
            chosen = tl.where(used, expert, -1)
            tl.store(expert_ids + rows * num_choices + k, chosen, inside)
            tl.store(weights + rows * num_choices + k, 0.0, inside & ~used)
            if record_logits is not None:
                tl.store(record_expert_ids + at + k, chosen, inside)
                tl.store(record_chosen_ids + at + k, chosen, inside)
                tl.store(record_weights + at + k, 0.0, inside & ~used)

        weight = tl.where(place >= 0, probability, 0.0)
        if RENORMALIZE:
            weight = tl.div_rn(weight, tl.maximum(tl.sum(weight, 1), 1e-30)[:, None])
        tl.store(weights + rows[:, None] * num_choices + place, weight, place >= 0)
        if record_logits is not None:
            tl.store(record_weights + at[:, None] + place, weight, place >= 0)
    tl.debug_barrier()
    _group(expert_ids, num_assignments, sorted_ids, block_experts, num_blocks, EXPERTS, BLOCK_M, PLACES)


@triton.jit(do_not_specialize=["num_assignments", "num_blocks"])
def group_kernel(
    expert_ids,  # [T, K] int32
    sorted_ids,  # [num_blocks * BLOCK_M] int32, written
    block_experts,  # [num_blocks] int32, written
    num_assignments,
    num_blocks,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The blocks of a routing that is there already."""
    _fill(sorted_ids, num_assignments, num_blocks * BLOCK_M)
    tl.debug_barrier()
    _group(expert_ids, num_assignments, sorted_ids, block_experts, num_blocks, EXPERTS, BLOCK_M, PLACES)


@triton.jit
def _fill(sorted_ids, value, size):
    for start in range(0, size, 1024):
        index = start + tl.arange(0, 1024)
        tl.store(sorted_ids + index, value, index < size)


@triton.jit
def _group(
    expert_ids,
    num_assignments,
    sorted_ids,
    block_experts,
    num_blocks,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Sort the assignments into blocks; sorted_ids is filled with padding already.

    Two passes: the first counts every expert's assignments, the second places them, an assignment's rank being the
    number of equal ones before it in its chunk, plus those of the chunks before.
    """
    experts = tl.arange(0, EXPERTS)[:, None]
    counts = tl.zeros([EXPERTS], tl.int32)
    for start in range(0, num_assignments, PLACES):
        flat = start + tl.arange(0, PLACES)
        owner = tl.load(expert_ids + flat, flat < num_assignments, -1)
        counts += tl.sum((owner[None, :] == experts).to(tl.int32), 1)
    used_blocks = (counts + BLOCK_M - 1) // BLOCK_M
    ends = tl.cumsum(used_blocks, 0)
    for start in range(0, num_blocks, PLACES):
        block = start + tl.arange(0, PLACES)
        owner = tl.sum((ends[:, None] <= block[None, :]).to(tl.int32), 0)
        tl.store(block_experts + block, tl.where(owner < EXPERTS, owner, -1), block < num_blocks)
    begin = (ends - used_blocks) * BLOCK_M
    for start in range(0, num_assignments, PLACES):
        flat = start + tl.arange(0, PLACES)
        owner = tl.load(expert_ids + flat, flat < num_assignments, -1)
        mine = (owner[None, :] == experts).to(tl.int32)
        position = begin[:, None] + tl.cumsum(mine, 1) - 1
        tl.store(sorted_ids + position, flat[None, :], mine != 0)
        begin += tl.sum(mine, 1)
