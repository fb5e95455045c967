"""Weights in the CPU's layout, and weights of 8 bits: what a load leaves, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.backends.cpu import CpuBackend, PackedParam
from engine.backends.cuda.moe import quantize_rows
from engine.backends.cuda.store import ExpertStore
from engine.backends.store import ParamStore
from engine.kernels.cpu.library import InstructionSet, WeightType, available
from tests.tiny import TINY_MIXTRAL, tiny_tensors, write_tiny_mixtral
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig
from weights.families import family_of
from weights.families.mixtral import param_specs
from weights.loader import load
from weights.params import ParamKind, Piece

CPU = torch.device("cpu")
# Lines of 32 bf16 or 64 bytes, whole and in part; blocks of 16 rows, the same; heads of a block and more.
CONFIGS: dict[str, ModelConfig] = {
    "tiny": TINY_MIXTRAL,
    "odd": replace(TINY_MIXTRAL, hidden_size=67, intermediate_size=37, num_heads=3, num_kv_heads=1, head_dim=22),
    "even": replace(TINY_MIXTRAL, hidden_size=128, intermediate_size=192, head_dim=32),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weight_type", list(WeightType), ids=lambda kind: kind.name)
@pytest.mark.parametrize("isa", available(), ids=lambda isa: isa.name)
def test_the_layout_holds_every_weight(
    isa: InstructionSet, weight_type: WeightType, source: torch.dtype, config: ModelConfig
) -> None:
    """Against the layout of engine/kernels/cpu/gemm.h, written out in torch, with rounding by torch."""
    backend = CpuBackend(config, dtype=torch.float32, weight_type=weight_type, instruction_set=isa)
    stored = ParamStore(param_specs(config), device=CPU, dtype=torch.float32)
    tensors = tiny_tensors(config)
    tensors["lm_head.weight"][3] = 0
    tensors["lm_head.weight"][4, 5:] *= 1e-30
    tensors["model.embed_tokens.weight"] = ties(tensors["model.embed_tokens.weight"])
    for piece in family_of(config).pieces(config):
        tensor = tensors[piece.source].to(source)
        backend.prepare(piece, tensor)
        stored.put(piece, tensor)
    for name, packed in backend._packed.items():
        rows = stored[name].reshape(-1, stored[name].shape[-1])
        if name.endswith(".qkv"):
            rows = torch.nn.functional.pad(
                rows.view(-1, config.head_dim, rows.shape[-1]), (0, 0, 0, backend._head_stride - config.head_dim)
            ).flatten(0, 1)
        narrow, scales = expected(rows, weight_type)
        assert torch.equal(unpacked(packed, packed.data, rows.shape), narrow), name
        assert packed.data.count_nonzero() == narrow.count_nonzero(), "padding is 0"
        if packed.scales is not None:
            one_wide = replace(packed, size=1)
            assert torch.equal(unpacked(one_wide, packed.scales.view(-1, 1, 16, 1), (rows.shape[0], 1)), scales), name


def ties(x: Tensor) -> Tensor:
    """Rows that have the largest number 127, and otherwise halves: where int8 rounds to even."""
    x = (x * 40).round().clamp(-126, 126) / 2
    x[:, 0] = 127
    return x


def expected(rows: Tensor, weight_type: WeightType) -> tuple[Tensor, Tensor]:
    if weight_type is not WeightType.int8:
        return rows.to(torch.bfloat16 if weight_type is WeightType.bfloat16 else torch.float32), torch.empty(0)
    scales = rows.abs().amax(dim=1, keepdim=True) / 127
    return torch.where(scales > 0, (rows / scales).round(), 0).to(torch.int8), scales


def unpacked(param: PackedParam, data: Tensor, shape: tuple[int, ...] | torch.Size) -> Tensor:
    """data [blocks, k / g, 16, g] (of float32 [blocks, k, 16]) -> rows, with those of gate and up put apart again."""
    data = data if data.dim() == 4 else data.unsqueeze(-1)
    blocks = data.permute(0, 2, 1, 3).reshape(data.shape[0], 16, -1)  # [blocks, 16, k]
    if not param.interleaved:
        per_matrix = blocks.reshape(-1, param.num_blocks * 16, blocks.shape[-1])[:, : param.num_rows]
        return per_matrix.flatten(0, 1)[: shape[0], : shape[1]]
    halves = blocks.view(-1, param.num_blocks // 2, 2, 16, blocks.shape[-1]).transpose(1, 2)
    rows = halves.flatten(2, 3)[:, :, : param.num_rows // 2]  # [E, 2, F, k]
    return rows.flatten(0, 2)[: shape[0], : shape[1]]


# Loading from shards and quantising, against loading all and quantising it then


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("isa", available(), ids=lambda isa: isa.name)
def test_int8_of_shards_equals_int8_of_the_whole(tmp_path: Path, isa: InstructionSet, config: ModelConfig) -> None:
    write_tiny_mixtral(tmp_path, config, dtype="bfloat16", shards=4)
    streamed, later = (
        CpuBackend(config, dtype=torch.bfloat16, weight_type=WeightType.int8, instruction_set=isa) for _ in range(2)
    )
    load(open_checkpoint(tmp_path), streamed)
    for piece, tensor in loaded(tmp_path, config).items():
        later.prepare(piece, tensor)
    assert streamed._packed.keys() == later._packed.keys()
    for name, packed in later._packed.items():
        assert packed.scales is not None
        assert packed.scales.any()
        assert torch.equal(streamed._packed[name].data, packed.data), name
        assert torch.equal(scales_of(streamed._packed[name]), packed.scales), name


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_8_bits_of_shards_equal_8_bits_of_the_whole(tmp_path: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """For the GPU's kernels: all experts' matrices at once are quantised after the load."""
    write_tiny_mixtral(tmp_path, config, dtype="bfloat16", shards=4)
    specs = [spec for spec in param_specs(config) if spec.kind is ParamKind.EXPERT]
    store = ExpertStore(specs, device=CPU, dtype=dtype)
    load(open_checkpoint(tmp_path), _Experts(store, {spec.name for spec in specs}))
    whole = ParamStore(param_specs(config), device=CPU, dtype=torch.bfloat16)
    for piece, tensor in loaded(tmp_path, config).items():
        whole.put(piece, tensor)
    for layer in range(config.num_layers):
        weights = store.weights(layer)
        for ours, scale, name in ((weights.w13, weights.w13_scale, "w13"), (weights.w2, weights.w2_scale, "w2")):
            expected_weights, expected_scale = quantize_rows(whole[f"layers.{layer}.{name}"], dtype)
            assert ours.dtype == dtype
            assert torch.equal(ours.view(torch.uint8), expected_weights.view(torch.uint8))
            assert scale is not None
            assert torch.equal(scale, expected_scale)


class _Experts:
    """Hands an ExpertStore its pieces."""

    def __init__(self, store: ExpertStore, names: set[str]) -> None:
        self._store = store
        self._names = names

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        if piece.param in self._names:
            self._store.put(piece, tensor, scale)


def loaded(folder: Path, config: ModelConfig) -> dict[Piece, Tensor]:
    """The whole checkpoint in memory, in 16 bits."""
    tensors = {name: tensor.clone() for name, tensor in open_checkpoint(folder).read()}
    return {piece: tensors[piece.source] for piece in family_of(config).pieces(config)}


def scales_of(param: PackedParam) -> Tensor:
    assert param.scales is not None
    return param.scales
