"""The experts of a layer on the GPU: the launches of engine/kernels/triton/moe.py, or torch's grouped products.

Dimensions as in engine/backends/base.py; A = T*K assignments, P places of the blocks, padding included.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from engine.backends.cuda.launch import Launch
from engine.backends.cuda.routing import ExpertBlocks
from engine.backends.cuda.tiles import ExpertTiles, Tile
from engine.kernels.triton.moe import down_kernel, silu_mul_kernel, sum_kernel, up_kernel

_TINY = 1e-20
"""The largest value of a row is taken for no less, so that a row of zeros has a scale to divide by."""


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """Weights of all experts, of the activations' dtype, or of 8 bits with a float32 scale for each output column."""

    w13: Tensor  # [E, 2F, D]: rows of the gate, then of up
    w2: Tensor  # [E, D, F]
    w13_scale: Tensor | None  # [E, 2F]
    w2_scale: Tensor | None  # [E, D]


def quantize_rows(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """tensor [..., N] -> int8 or float8 e4m3 of that shape and a float32 scale [...]: tensor is about q * scale, the
    largest of a row becoming the largest of the dtype. Rounds to nearest.
    """
    largest = 127 if dtype == torch.int8 else torch.finfo(dtype).max
    wide = tensor.float()
    scale = wide.abs().amax(dim=-1).clamp(min=_TINY) / largest
    wide = wide / scale.unsqueeze(-1)
    return (wide.round() if dtype == torch.int8 else wide).to(dtype), scale


def experts(
    x: Tensor,
    weights: ExpertWeights,
    expert_ids: Tensor,
    routing_weights: Tensor,
    blocks: ExpertBlocks,
    residual: Tensor,
    tiles: ExpertTiles,
) -> None:
    """residual [T, D] += sum_k weight_k * W2_k(silu(W1_k row) * W3_k row) for the rows of x [T, D], in place.

    expert_ids [T, K] int32 (-1: no expert), routing_weights [T, K] float32, and the blocks of them by tiles.block_m.
    A row of padding may have experts: it is computed like any other, unless `blocks` leaves it out, which makes its
    residual undefined.
    """
    num_assignments = expert_ids.numel()
    places = None
    if tiles.grouped:
        grouped, places = _grouped_products(x, weights, routing_weights, blocks)
    else:
        middle = x.new_empty(num_assignments, weights.w2.shape[2])
        grouped = x.new_empty(num_assignments, x.shape[1])
        up_launch(x, weights, blocks, expert_ids.shape[1], middle, tiles.up).run()
        down_launch(middle, weights, routing_weights, blocks, grouped, tiles.down).run()
    sum_launch(grouped, places, expert_ids, residual).run()


def up_launch(
    x: Tensor, weights: ExpertWeights, blocks: ExpertBlocks, num_choices: int, middle: Tensor, tile: Tile
) -> Launch:
    """middle [A, F] = silu(gate) * up of x [T, D]."""
    intermediate = middle.shape[1]
    num_blocks = blocks.block_experts.shape[0]
    return Launch(
        kernel=up_kernel,
        grid=(num_blocks * triton.cdiv(intermediate, tile.block_n),),
        args={
            "x": x,
            "w13": weights.w13,
            "scale": weights.w13_scale,
            "sorted_ids": blocks.sorted_ids,
            "block_experts": blocks.block_experts,
            "middle": middle,
            "num_assignments": middle.shape[0],
            "num_choices": num_choices,
            "num_blocks": num_blocks,
        },
        constexprs={"D": x.shape[1], "F": intermediate, **_blocks(blocks.block_m, tile)},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def down_launch(
    middle: Tensor,
    weights: ExpertWeights,
    routing_weights: Tensor,
    blocks: ExpertBlocks,
    grouped: Tensor,
    tile: Tile,
) -> Launch:
    """grouped [A, D] = routing weight [T, K] times w2 of middle [A, F]."""
    hidden = grouped.shape[1]
    num_blocks = blocks.block_experts.shape[0]
    return Launch(
        kernel=down_kernel,
        grid=(num_blocks * triton.cdiv(hidden, tile.block_n),),
        args={
            "middle": middle,
            "w2": weights.w2,
            "scale": weights.w2_scale,
            "routing_weights": routing_weights,
            "sorted_ids": blocks.sorted_ids,
            "block_experts": blocks.block_experts,
            "grouped": grouped,
            "num_assignments": grouped.shape[0],
            "num_blocks": num_blocks,
        },
        constexprs={"F": middle.shape[1], "D": hidden, **_blocks(blocks.block_m, tile)},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def sum_launch(grouped: Tensor, places: Tensor | None, expert_ids: Tensor, residual: Tensor) -> Launch:
    """residual [T, D] += the choices of every token; grouped [A, D] by assignment, or [P, D] by places [A] int32."""
    num_tokens, hidden = residual.shape
    block = min(1024, triton.next_power_of_2(hidden))
    return Launch(
        kernel=sum_kernel,
        grid=(num_tokens, triton.cdiv(hidden, block)),
        args={
            "grouped": grouped,
            "places": places,
            "expert_ids": expert_ids,
            "residual": residual,
            "num_choices": expert_ids.shape[1],
        },
        constexprs={"D": hidden, "BLOCK_N": block},
        num_warps=4,
        num_stages=1,
    )


def silu_mul_launch(
    gate_up: Tensor, routing_weights: Tensor, blocks: ExpertBlocks, middle: Tensor, scale: Tensor | None
) -> Launch:
    """middle [P, F] = routing weight * silu(gate) * up of gate_up [P, 2F]; a middle of e4m3 has its scale [P]."""
    intermediate = middle.shape[1]
    return Launch(
        kernel=silu_mul_kernel,
        grid=(middle.shape[0],),
        args={
            "gate_up": gate_up,
            "routing_weights": routing_weights,
            "sorted_ids": blocks.sorted_ids,
            "middle": middle,
            "scale": scale,
            "num_assignments": routing_weights.numel(),
        },
        constexprs={
            "F": intermediate,
            "LARGEST": torch.finfo(torch.float8_e4m3fn).max,
            "TINY": _TINY,
            "BLOCK_N": min(2048, triton.next_power_of_2(intermediate)),
        },
        num_warps=8,
        num_stages=1,
    )


def _blocks(block_m: int, tile: Tile) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m}


def _grouped_products(
    x: Tensor, weights: ExpertWeights, routing_weights: Tensor, blocks: ExpertBlocks
) -> tuple[Tensor, Tensor]:
    """Both products by torch (bfloat16 weights, or e4m3 with activations quantised by row), over rows in the order of
    the blocks, padding included: [P, D], and the place of each assignment [A + 1] int32.

    Example, the blocks of `ExpertBlocks`: rows of tokens 0, 1, 2, 2, 0, 2, and more of 2 as padding; the experts' rows
    end at 2, 4 and 6; assignment 4, token 2's first, has place 5.
    """
    num_assignments, num_choices = routing_weights.numel(), routing_weights.shape[1]
    w13, w2 = weights.w13.transpose(1, 2), weights.w2.transpose(1, 2)
    ends = expert_ends(blocks, w13.shape[0])
    tokens = blocks.sorted_ids.clamp(max=num_assignments - 1) // num_choices
    order = torch.arange(tokens.shape[0], dtype=torch.int32, device=x.device)
    # Zeros, since who has no place is looked up, too, if it is padding that has experts.
    places = torch.zeros(num_assignments + 1, dtype=torch.int32, device=x.device)
    places.scatter_(0, blocks.sorted_ids.long(), order)
    if weights.w13_scale is None or weights.w2_scale is None:
        gate_up = F.grouped_mm(x.index_select(0, tokens), w13, offs=ends)
        middle = gate_up.new_empty(tokens.shape[0], w2.shape[1])
        silu_mul_launch(gate_up, routing_weights, blocks, middle, None).run()
        return F.grouped_mm(middle, w2, offs=ends), places
    narrow, scale = quantize_rows(x, weights.w13.dtype)
    narrow = narrow.view(torch.uint8).index_select(0, tokens).view(narrow.dtype)
    gate_up = _scaled_product(narrow, scale.index_select(0, tokens), w13, weights.w13_scale, ends)
    narrow = narrow.new_empty(tokens.shape[0], w2.shape[1])
    scale = scale.new_empty(tokens.shape[0])
    silu_mul_launch(gate_up, routing_weights, blocks, narrow, scale).run()
    return _scaled_product(narrow, scale, w2, weights.w2_scale, ends), places


def _scaled_product(x: Tensor, x_scale: Tensor, weights: Tensor, weights_scale: Tensor, ends: Tensor) -> Tensor:
    """x [P, in] and weights [E, in, out], of e4m3, with scales [P] and [E, out] -> [P, out] bfloat16."""
    by_row = F.ScalingType.RowWise
    product: Tensor = F.scaled_grouped_mm(  # type: ignore[attr-defined]
        x, weights, x_scale, by_row, weights_scale, by_row, offs=ends
    )
    return product


def expert_ends(blocks: ExpertBlocks, num_experts: int) -> Tensor:
    """Where every expert's places end: [E] int32. Example, block_experts [0, 2, 2, -1], block_m 16, E = 3: 16, 16,
    48."""
    own = blocks.block_experts.unsqueeze(0)
    upto = torch.arange(num_experts, device=own.device).unsqueeze(1)
    return ((own >= 0) & (own <= upto)).sum(dim=1, dtype=torch.int32) * blocks.block_m
