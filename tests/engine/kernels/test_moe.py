"""The experts' kernels under the interpreter, against plain loops."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.cuda.moe import ExpertWeights, down_launch, expert_ends, experts, quantize_rows, silu_mul_launch
from engine.backends.cuda.routing import ExpertBlocks
from engine.backends.cuda.tiles import ExpertTiles, Tile

pytestmark = pytest.mark.interpreter

E4M3 = torch.float8_e4m3fn
TILES = ExpertTiles("sm_90", 16, 64, 16, Tile(32, 16, 2, 4, 3), Tile(16, 32, 3, 4, 3), False, "test")
GROUPED = ExpertTiles("sm_90", 16, 64, 16, TILES.up, TILES.down, True, "test")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """New memory is NaN, or the largest of integers."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(2).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def routing(rows: int, choices: int, num_experts: int, seed: int = 0, *, unused: float = 0.2) -> tuple[Tensor, Tensor]:
    """Uneven expert ids [rows, choices] int32, a share of them -1, and weights."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, num_experts, generator=generator) - torch.arange(num_experts) / num_experts / 2
    ids = scores.topk(choices).indices.int()
    ids[torch.rand(rows, choices, generator=generator) < unused] = -1
    weights = torch.rand(rows, choices, generator=generator)
    return ids, torch.where(ids < 0, 0.0, weights)


def blocks_of(expert_ids: Tensor, num_experts: int, block_m: int, valid_rows: int | None = None) -> ExpertBlocks:
    """The blocks as `ExpertBlocks` defines them."""
    num = expert_ids.numel()
    flat = expert_ids[:valid_rows].flatten().tolist()
    max_blocks = min(num, num_experts) + num // block_m
    ids, owners = [], []
    for expert in range(num_experts):
        own = [place for place, other in enumerate(flat) if other == expert]
        count = -(-len(own) // block_m)
        ids += own + [num] * (count * block_m - len(own))
        owners += [expert] * count
    ids += [num] * (max_blocks * block_m - len(ids))
    owners += [-1] * (max_blocks - len(owners))
    return ExpertBlocks(torch.tensor(ids, dtype=torch.int32), torch.tensor(owners, dtype=torch.int32), block_m)


def make_weights(
    num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype, weight_dtype: torch.dtype, seed: int = 1
) -> tuple[ExpertWeights, Tensor, Tensor]:
    """Noisy experts, of different sizes, and what they stand for: w13 and w2 in float32."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.5, 2, num_experts)[:, None, None]
    w13 = size * torch.randn(num_experts, 2 * intermediate, hidden, generator=generator) / hidden**0.5
    w2 = size * torch.randn(num_experts, hidden, intermediate, generator=generator) / intermediate**0.5
    if weight_dtype == dtype:
        w13, w2 = w13.to(dtype), w2.to(dtype)
        return ExpertWeights(w13, w2, None, None), w13.float(), w2.float()
    (q13, scale13), (q2, scale2) = quantize_rows(w13, weight_dtype), quantize_rows(w2, weight_dtype)
    weights = ExpertWeights(q13, q2, scale13, scale2)
    return weights, q13.float() * scale13.unsqueeze(-1), q2.float() * scale2.unsqueeze(-1)


def expected(
    x: Tensor, w13: Tensor, w2: Tensor, expert_ids: Tensor, routing_weights: Tensor, residual: Tensor
) -> Tensor:
    result = residual.float().clone()
    for row in range(x.shape[0]):
        for expert, weight in zip(expert_ids[row].tolist(), routing_weights[row], strict=True):
            if expert >= 0:
                gate, up = (w13[expert] @ x[row].float()).chunk(2)
                result[row] += weight * (w2[expert] @ (F.silu(gate) * up))
    return result


def close(actual: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(actual.float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("weight_dtype", [None, torch.int8, E4M3])
@pytest.mark.parametrize(
    ("rows", "choices", "num_experts", "hidden", "intermediate"),
    [(37, 2, 3, 40, 56), (13, 3, 5, 64, 96), (1, 2, 8, 33, 17)],
)
def test_reference(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    rows: int,
    choices: int,
    num_experts: int,
    hidden: int,
    intermediate: int,
) -> None:
    """Sizes that tiles do not divide, and that they do; -1 places; experts of more than one block."""
    weights, w13, w2 = make_weights(num_experts, hidden, intermediate, dtype, weight_dtype or dtype)
    ids, routing_weights = routing(rows, choices, num_experts)
    x, residual = torch.randn(rows, hidden).to(dtype), torch.randn(rows, hidden).to(dtype)
    wanted = expected(x, w13, w2, ids, routing_weights, residual)
    experts(x, weights, ids, routing_weights, blocks_of(ids, num_experts, 16), residual, TILES)
    close(residual, wanted, dtype)


def test_all_rows_to_one_expert_and_the_others_are_not_read() -> None:
    weights, w13, w2 = make_weights(4, 24, 40, torch.float32, torch.float32)
    for tensor in (weights.w13, weights.w2):
        tensor[[0, 1, 3]] = torch.nan
    ids, routing_weights = torch.full((35, 1), 2, dtype=torch.int32), torch.rand(35, 1)
    x, residual = torch.randn(35, 24), torch.randn(35, 24)
    wanted = expected(x, w13, w2, ids, routing_weights, residual)
    experts(x, weights, ids, routing_weights, blocks_of(ids, 4, 16), residual, TILES)
    close(residual, wanted, torch.float32)


def test_no_expert_at_all_leaves_the_residual() -> None:
    weights, _, _ = make_weights(4, 24, 40, torch.float32, torch.float32)
    ids = torch.full((5, 2), -1, dtype=torch.int32)
    x, residual = torch.randn(5, 24), torch.randn(5, 24)
    before = residual.clone()
    experts(x, weights, ids, torch.zeros(5, 2), blocks_of(ids, 4, 16), residual, TILES)
    assert residual.equal(before)


@pytest.mark.parametrize("tiles", [TILES, GROUPED])
def test_padding_that_has_experts_but_no_block_changes_no_other_row(tiles: ExpertTiles) -> None:
    dtype = torch.bfloat16 if tiles.grouped else torch.float32
    weights, w13, w2 = make_weights(4, 24, 40, dtype, dtype)
    ids, routing_weights = routing(11, 2, 4)
    x, residual = torch.randn(11, 24).to(dtype), torch.randn(11, 24).to(dtype)
    x[7:] = torch.nan
    wanted = expected(x, w13, w2, ids, routing_weights, residual)
    experts(x, weights, ids, routing_weights, blocks_of(ids, 4, 16, valid_rows=7), residual, tiles)
    close(residual[:7], wanted[:7], dtype)


def test_rows_without_an_expert_are_not_multiplied() -> None:
    """What is left in their memory may be anything: products of it that overflow are a warning here, so an error."""
    weights, _, w2 = make_weights(4, 24, 40, torch.float32, torch.float32)
    ids, routing_weights = torch.tensor([[-1, 3], [2, -1], [-1, 2]], dtype=torch.int32), torch.rand(3, 2)
    used = ids.flatten() >= 0
    middle = torch.randn(6, 40)
    middle[~used] = torch.finfo(torch.float32).max
    grouped = torch.full((6, 24), torch.nan)
    down_launch(middle, weights, routing_weights, blocks_of(ids, 4, 16), grouped, TILES.down).run()
    wanted = torch.einsum("rdf,rf->rd", w2[ids.flatten()[used]], middle[used]) * routing_weights.flatten()[used, None]
    close(grouped[used], wanted, torch.float32)
    assert grouped[~used].isnan().all()


@pytest.mark.parametrize("weight_dtype", [torch.int8, E4M3])
def test_an_expert_beyond_two_to_the_31_elements(weight_dtype: torch.dtype) -> None:
    """Of all these experts one is ever touched: the memory of the others is never taken."""
    torch.use_deterministic_algorithms(False)
    hidden, intermediate, num_experts = 32, 32, 2**20 + 1  # w13 has 2 * 32 * 32 an expert
    small, w13, w2 = make_weights(1, hidden, intermediate, torch.float32, weight_dtype)
    assert small.w13_scale is not None
    assert small.w2_scale is not None
    weights = ExpertWeights(
        torch.empty(num_experts, 2 * intermediate, hidden, dtype=weight_dtype),
        torch.empty(num_experts, hidden, intermediate, dtype=weight_dtype),
        torch.empty(num_experts, 2 * intermediate),
        torch.empty(num_experts, hidden),
    )
    assert weights.w13_scale is not None
    assert weights.w2_scale is not None
    weights.w13[-1], weights.w2[-1] = small.w13[0], small.w2[0]
    weights.w13_scale[-1], weights.w2_scale[-1] = small.w13_scale[0], small.w2_scale[0]
    x, residual = torch.randn(3, hidden), torch.randn(3, hidden)
    zeros = torch.zeros(3, 1, dtype=torch.int32)
    routing_weights = torch.rand(3, 1)
    wanted = expected(x, w13, w2, zeros, routing_weights, residual)
    blocks = blocks_of(zeros, 1, 16)
    blocks.block_experts[0] = num_experts - 1
    experts(x, weights, zeros + num_experts - 1, routing_weights, blocks, residual, TILES)
    close(residual, wanted, torch.float32)


@pytest.mark.parametrize("rows", [1, 70])
def test_grouped_products(rows: int) -> None:
    weights, w13, w2 = make_weights(5, 40, 56, torch.bfloat16, torch.bfloat16)
    ids, routing_weights = routing(rows, 2, 5, unused=0.2 if rows > 1 else 0)
    x, residual = torch.randn(rows, 40).bfloat16(), torch.randn(rows, 40).bfloat16()
    wanted = expected(x, w13, w2, ids, routing_weights, residual)
    experts(x, weights, ids, routing_weights, blocks_of(ids, 5, 16), residual, GROUPED)
    close(residual, wanted, torch.bfloat16)


def test_scaled_grouped_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none on the CPU: torch's own check of the arguments, and a loop, stand for it."""

    def scaled_grouped_mm(
        x: Tensor, weights: Tensor, x_scale: Tensor, _recipe: object, scale: Tensor, _: object, *, offs: Tensor
    ) -> Tensor:
        meta = [tensor.to("meta") for tensor in (x, weights, x_scale, scale, offs)]
        meta[1] = meta[1].transpose(1, 2).contiguous().transpose(1, 2)
        assert weights.stride() == meta[1].stride()
        assert torch.ops.aten._scaled_grouped_mm(*meta).shape == (x.shape[0], weights.shape[2])
        result = torch.empty(x.shape[0], weights.shape[2], dtype=torch.bfloat16)
        start = 0
        for expert, end in enumerate(offs.tolist()):
            wide = (x[start:end].float() * x_scale[start:end, None]) @ (weights[expert].float() * scale[expert])
            result[start:end], start = wide.bfloat16(), end
        return result

    monkeypatch.setattr(F, "scaled_grouped_mm", scaled_grouped_mm)
    weights, w13, w2 = make_weights(5, 48, 64, torch.bfloat16, E4M3)
    ids, routing_weights = routing(70, 2, 5)
    x, residual = torch.randn(70, 48).bfloat16(), torch.randn(70, 48).bfloat16()
    wanted = expected(x, w13, w2, ids, routing_weights, residual)
    experts(x, weights, ids, routing_weights, blocks_of(ids, 5, 16), residual, GROUPED)
    error = (residual.float() - wanted).norm() / (wanted - residual.float().mean()).norm()
    assert error < 0.05  # activations have three bits of mantissa


@pytest.mark.parametrize("dtype", [torch.float16, E4M3])
def test_silu_mul_of_rows_that_are_not_padding(dtype: torch.dtype) -> None:
    ids, routing_weights = routing(9, 2, 3)
    blocks = blocks_of(ids, 3, 16)
    places = blocks.sorted_ids.shape[0]
    gate_up = 3 * torch.randn(places, 2 * 2100)
    gate_up[0] = 0
    middle = torch.full((places, 2100), torch.nan).to(dtype)
    scale = torch.full((places,), torch.nan) if dtype == E4M3 else None
    silu_mul_launch(gate_up, routing_weights, blocks, middle, scale).run()
    used = blocks.sorted_ids < ids.numel()
    gate, up = gate_up[used].chunk(2, dim=-1)
    wanted = routing_weights.flatten()[blocks.sorted_ids[used].long()].unsqueeze(-1) * F.silu(gate) * up
    assert middle[~used].isnan().all()
    actual = middle.float()[used]
    if scale is None:
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-3)
    else:
        assert actual[1:].abs().amax(dim=-1).eq(448).all()
        # The interpreter's cast loses the carry of what is rounded up to a power of two.
        right = (wanted / scale[used, None]).to(E4M3).view(torch.uint8) & 7 != 0
        torch.testing.assert_close((actual * scale[used, None])[right], wanted[right], rtol=0.07, atol=0.01)


def test_expert_ends_are_those_of_the_worked_example() -> None:
    owners = torch.tensor([0, 2, 2, -1], dtype=torch.int32)
    assert expert_ends(ExpertBlocks(torch.empty(64), owners, 16), 3).tolist() == [16, 16, 48]


@pytest.mark.parametrize(("dtype", "largest", "step"), [(torch.int8, 127, 1 / 254), (E4M3, 448, 1 / 16)])
def test_quantize_rows(dtype: torch.dtype, largest: float, step: float) -> None:
    rows = torch.randn(3, 5, 64) * torch.logspace(-6, 3, 5).unsqueeze(-1)
    rows[1, 2] = 0
    q, scale = quantize_rows(rows, dtype)
    assert (q.dtype, q.shape, scale.shape, scale.dtype) == (dtype, rows.shape, rows.shape[:-1], torch.float32)
    assert q.float().abs().amax(dim=-1).tolist() == [
        [largest if j != 2 or i != 1 else 0 for j in range(5)] for i in range(3)
    ]
    error = (q.float() * scale.unsqueeze(-1) - rows).abs()
    bound = rows.abs().amax(dim=-1, keepdim=True) if dtype == torch.int8 else rows.abs()
    assert (error <= 1.001 * step * bound + scale.unsqueeze(-1) * (2**-9 if dtype == E4M3 else 0)).all()
