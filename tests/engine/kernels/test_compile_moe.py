"""Every tile of the table, and the experts' other kernels, compiled for the cards at the sizes of Mixtral 8x7B."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.launch import Launch
from engine.backends.cuda.moe import ExpertWeights, down_launch, silu_mul_launch, sum_launch, up_launch
from engine.backends.cuda.routing import ExpertBlocks
from engine.backends.cuda.tiles import SMALLEST_SHARED, Tile, read_table, shared_bytes, table_path
from tests.engine.kernels.compile import WARPGROUP_MMA, assert_fits, compiled

E4M3 = torch.float8_e4m3fn
MMA = {(8, 0): "HMMA", (9, 0): WARPGROUP_MMA}


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def launch_of(
    kernel: str,
    block_m: int,
    tile: Tile,
    weight_dtype: torch.dtype,
    dtype: torch.dtype = torch.bfloat16,
    *,
    hidden: int = 4096,
    intermediate: int = 14336,
) -> Launch:
    """The launch of a tile: 8 experts, 64 tokens with 2 choices."""
    up, down = (8, 2 * intermediate, hidden), (8, hidden, intermediate)
    scales = [empty(*size[:2], dtype=torch.float32) if weight_dtype != dtype else None for size in (up, down)]
    weights = ExpertWeights(empty(*up, dtype=weight_dtype), empty(*down, dtype=weight_dtype), *scales)
    routing_weights = empty(64, 2, dtype=torch.float32)
    blocks = ExpertBlocks.empty(routing_weights, 8, block_m)
    middle = empty(128, intermediate, dtype=dtype)
    if kernel == "up":
        return up_launch(empty(64, hidden, dtype=dtype), weights, blocks, 2, middle, tile)
    return down_launch(middle, weights, routing_weights, blocks, empty(128, hidden, dtype=dtype), tile)


def tiles() -> Iterator[tuple[tuple[int, int], str, int, Tile, torch.dtype]]:
    """Capability, kernel, block_m, tile and dtype of the weights: what the table has, each once; the number of blocks
    that take turns changes no instruction that matters here."""
    seen = set()
    for entry in read_table(table_path()):
        capability = (int(entry.card[-2]), int(entry.card[-1]))
        narrow = [torch.int8, E4M3] if capability >= (8, 9) else [torch.int8]
        for kernel, tile in (("up", entry.up), ("down", entry.down)):
            for weight_dtype in [torch.bfloat16] if entry.bits == 16 else narrow:
                found = (capability, kernel, entry.block_m, replace(tile, group_m=16), weight_dtype)
                if found not in seen:
                    seen.add(found)
                    yield found


@pytest.mark.parametrize(("capability", "kernel", "block_m", "tile", "weight_dtype"), list(tiles()))
def test_tile(capability: tuple[int, int], kernel: str, block_m: int, tile: Tile, weight_dtype: torch.dtype) -> None:
    card = 10 * capability[0] + capability[1]
    code = compiled(launch_of(kernel, block_m, tile, weight_dtype), card)
    assert_fits(code, card, mma=MMA[capability])
    matrices = 2 if kernel == "up" else 1
    bits = 8 * weight_dtype.itemsize
    predicted = shared_bytes(tile, block_m, matrices=matrices, bits=bits, capability=capability)
    assert code.shared_bytes == predicted, code
    if capability == (8, 0):
        assert code.shared_bytes <= SMALLEST_SHARED, code


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.int8, E4M3])
def test_float16_and_sizes_that_no_tile_divides(weight_dtype: torch.dtype) -> None:
    bits = 8 * weight_dtype.itemsize
    entry = next(entry for entry in read_table(table_path()) if (entry.card, entry.bits) == ("sm_90", bits))
    for kernel, tile in (("up", entry.up), ("down", entry.down)):
        launch = launch_of(kernel, entry.block_m, tile, weight_dtype, torch.float16, hidden=1000, intermediate=1528)
        assert_fits(compiled(launch, 90), 90, mma=WARPGROUP_MMA)


@pytest.mark.parametrize("capability", [80, 90])
def test_sum(capability: int) -> None:
    expert_ids = empty(64, 2, dtype=torch.int32)
    for places in (None, empty(129, dtype=torch.int32)):
        launch = sum_launch(empty(256, 4096), places, expert_ids, empty(64, 4096))
        assert_fits(compiled(launch, capability), capability)


@pytest.mark.parametrize("dtype", [torch.bfloat16, E4M3])
def test_silu_mul(dtype: torch.dtype) -> None:
    routing_weights = empty(64, 2, dtype=torch.float32)
    blocks = ExpertBlocks.empty(routing_weights, 8, 16)
    places = blocks.sorted_ids.shape[0]
    scale = empty(places, dtype=torch.float32) if dtype == E4M3 else None
    launch = silu_mul_launch(
        empty(places, 2 * 14336), routing_weights, blocks, empty(places, 14336, dtype=dtype), scale
    )
    assert_fits(compiled(launch, 90), 90)
