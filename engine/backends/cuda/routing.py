"""Routing on the GPU: the softmax router, its record and the grouping of assignments into blocks of one expert.

One program does all of it up to MAX_WORK (rows times places times experts); beyond that torch's operations do, which
neither wait for the device nor take a shape from it either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from engine.backends.cuda.launch import Launch
from engine.kernels.triton.routing import group_kernel, route_kernel
from engine.routing.base import GateOutput, Routing, RoutingInputs
from engine.routing.plan import group
from engine.routing.record import RoutingRecord
from engine.routing.topk_softmax import TopKSoftmax

MAX_EXPERTS = 256
MAX_WORK = 1 << 17
"""T * K * E that one program takes: 8192 rows of Mixtral (K = 2, E = 8). An estimate, not a measurement: there the
program's 2048 elements at a time take about as long as the 55 launches of torch's operations."""

_TILE = 2048
"""Rows or places times experts that a program holds at a time: 8 elements a thread, so that all fits in registers."""


@dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """Assignments t*K + k sorted by expert (stable), every expert's run padded to a multiple of block_m.

    Example, T = 3, K = 2, E = 3, block_m 2, expert_ids [[2, 0], [0, -1], [2, 1]], A = 6:

        expert         0     1     2     (none)
        sorted_ids     1 2   5 6   0 4   6 6   6 6   6 6     A in unused places
        block_experts  0     1     2     -1    -1    -1      max_blocks = min(6, 3) + 6 // 2 = 6

    Places that are -1 and rows that are padding belong to no block. No routing needs more blocks than there are: of n
    assignments an expert fills n // block_m blocks and begins at most one more, and only min(A, E) experts have any.
    """

    sorted_ids: Tensor  # [max_blocks * block_m] int32
    block_experts: Tensor  # [max_blocks] int32, ascending; -1 from the last used block on
    block_m: int

    @classmethod
    def empty(cls, expert_ids: Tensor, num_experts: int, block_m: int) -> ExpertBlocks:
        """Room for the blocks of `expert_ids` [T, K], on its device."""
        num_blocks = _max_blocks(expert_ids, num_experts, block_m)
        sorted_ids = torch.empty(num_blocks * block_m, dtype=torch.int32, device=expert_ids.device)
        return cls(sorted_ids, sorted_ids.new_empty(num_blocks), block_m)


def route(
    logits: Tensor,
    layer: int,
    inputs: RoutingInputs,
    *,
    renormalize: bool,
    block_m: int,
    record: RoutingRecord | None,
) -> tuple[Routing, ExpertBlocks]:
    """As `TopKSoftmax` without a capacity: logits [T, E], of any floating dtype; written into `record`, and grouped.

    Padding has no experts here, where `TopKSoftmax` routes it like any row.
    """
    num_tokens, num_experts = logits.shape
    num_choices = min(inputs.max_top_k, num_experts)
    if one_program(num_tokens, num_choices, num_experts):
        expert_ids = torch.empty(num_tokens, num_choices, dtype=torch.int32, device=logits.device)
        routing = Routing(expert_ids, torch.empty_like(expert_ids, dtype=torch.float32), logits, expert_ids)
        blocks = ExpertBlocks.empty(expert_ids, num_experts, block_m)
        route_launch(layer, inputs, routing, blocks, renormalize=renormalize, record=record).run()
        return routing, blocks
    routing = _route_by_torch(logits, layer, inputs, renormalize=renormalize)
    if record is not None:
        record.write(layer, routing)
    return routing, _group_by_torch(routing.expert_ids, num_experts, block_m)


def group_blocks(expert_ids: Tensor, num_experts: int, block_m: int) -> ExpertBlocks:
    """The blocks of `expert_ids` [T, K] int32, contiguous, of whatever router."""
    num_tokens, num_choices = expert_ids.shape
    if not one_program(num_tokens, num_choices, num_experts):
        return _group_by_torch(expert_ids, num_experts, block_m)
    blocks = ExpertBlocks.empty(expert_ids, num_experts, block_m)
    group_launch(expert_ids, num_experts, blocks).run()
    return blocks


def one_program(num_tokens: int, num_choices: int, num_experts: int) -> bool:
    """Whether one program routes and groups a batch of that size."""
    return num_experts <= MAX_EXPERTS and num_tokens * num_choices * num_experts <= MAX_WORK


def route_launch(
    layer: int,
    inputs: RoutingInputs,
    routing: Routing,
    blocks: ExpertBlocks,
    *,
    renormalize: bool,
    record: RoutingRecord | None,
) -> Launch:
    """Read the logits of `routing` and write its expert_ids and weights, the rows of `record` and the `blocks`."""
    num_tokens, num_experts = routing.logits.shape
    num_choices = routing.expert_ids.shape[1]
    assert routing.logits.is_contiguous()
    padded = triton.next_power_of_2(num_experts)
    rows, places = _chunk(num_tokens, padded), _chunk(num_tokens * num_choices, padded)
    return Launch(
        kernel=route_kernel,
        grid=(1,),
        args={
            "logits": routing.logits,
            "num_valid_rows": inputs.num_valid_tokens,
            "slots": inputs.slots,
            "top_k": inputs.top_k,
            "min_p": inputs.min_p,
            "forbidden": inputs.forbidden,
            "expert_ids": routing.expert_ids,
            "weights": routing.weights,
            "record_logits": None if record is None else record.logits,
            "record_expert_ids": None if record is None else record.expert_ids,
            "record_chosen_ids": None if record is None else record.chosen_ids,
            "record_weights": None if record is None else record.weights,
            "sorted_ids": blocks.sorted_ids,
            "block_experts": blocks.block_experts,
            "layer": layer,
            "num_rows": num_tokens,
            "num_choices": num_choices,
            "record_rows": 0 if record is None else record.logits.shape[1],
            "num_blocks": blocks.block_experts.shape[0],
        },
        constexprs={
            "NUM_LAYERS": inputs.forbidden.shape[1],
            "NUM_EXPERTS": num_experts,
            "EXPERTS": padded,
            "RENORMALIZE": renormalize,
            "BLOCK_M": blocks.block_m,
            "ROWS": rows,
            "PLACES": places,
        },
        num_warps=_warps(max(rows, places) * padded),
        num_stages=1,
    )


def group_launch(expert_ids: Tensor, num_experts: int, blocks: ExpertBlocks) -> Launch:
    """Write the `blocks` of `expert_ids` [T, K] int32, contiguous."""
    assert expert_ids.is_contiguous()
    padded = triton.next_power_of_2(num_experts)
    places = _chunk(expert_ids.numel(), padded)
    return Launch(
        kernel=group_kernel,
        grid=(1,),
        args={
            "expert_ids": expert_ids,
            "sorted_ids": blocks.sorted_ids,
            "block_experts": blocks.block_experts,
            "num_assignments": expert_ids.numel(),
            "num_blocks": blocks.block_experts.shape[0],
        },
        constexprs={"EXPERTS": padded, "BLOCK_M": blocks.block_m, "PLACES": places},
        num_warps=_warps(places * padded),
        num_stages=1,
    )


def _route_by_torch(logits: Tensor, layer: int, inputs: RoutingInputs, *, renormalize: bool) -> Routing:
    routing = TopKSoftmax(logits.shape[1], renormalize)(GateOutput(logits, None), layer, inputs)
    valid = torch.arange(logits.shape[0], device=logits.device) < inputs.num_valid_tokens
    kept = Routing.keeping(valid.unsqueeze(-1), routing.expert_ids, routing.weights, logits)
    return replace(kept, chosen_ids=kept.expert_ids)


def _group_by_torch(expert_ids: Tensor, num_experts: int, block_m: int) -> ExpertBlocks:
    """By `group`: a run begins at a multiple of block_m instead of where the one before it ends."""
    plan = group(expert_ids, num_experts)
    offsets = plan.offsets.long()
    ends = torch.cumsum((offsets.diff() + block_m - 1) // block_m, 0)
    moved = torch.nn.functional.pad(ends, (1, 0)) * block_m - offsets
    num_blocks = _max_blocks(expert_ids, num_experts, block_m)
    flat = expert_ids.flatten().long()
    # Unused places all go to one more than there are, which is cut off.
    position = torch.where(flat < 0, num_blocks * block_m, plan.inverse + moved[flat])
    sorted_ids = expert_ids.new_full((num_blocks * block_m + 1,), flat.shape[0])
    sorted_ids.scatter_(0, position, torch.arange(flat.shape[0], dtype=torch.int32, device=flat.device))
    blocks = torch.arange(num_blocks, device=flat.device)
    owners = torch.searchsorted(ends, blocks, right=True)
    block_experts = torch.where(blocks < ends[-1], owners, -1).to(torch.int32)
    return ExpertBlocks(sorted_ids[:-1], block_experts, block_m)


def _max_blocks(expert_ids: Tensor, num_experts: int, block_m: int) -> int:
    num_assignments = expert_ids.numel()
    return min(num_assignments, num_experts) + num_assignments // block_m


def _chunk(size: int, num_experts: int) -> int:
    """Rows or places that a program takes at a time: few where there are few, so that no work is for nothing."""
    wanted: int = triton.next_power_of_2(size)
    return min(max(wanted, 16), 256, _TILE // num_experts)


def _warps(elements: int) -> int:
    return 8 if elements > _TILE // 2 else 4
