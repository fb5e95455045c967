"""Backends that are given weights of float8 with scales: kept as they are, dequantised, or quantised anew."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine import startup
from engine.backends import select
from engine.backends.cpu import CpuBackend
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.card import Card
from engine.backends.cuda.moe import quantize_rows
from engine.backends.reference import ReferenceBackend
from engine.backends.select import make_backend
from engine.backends.store import ParamStore
from engine.backends.torch import TorchBackend
from engine.kernels.cpu.library import WeightType, best
from engine.plan import held_quantization
from tests.parity.paged import load_runner, paged_logits
from tests.tiny import TINY_MIXTRAL
from tests.tiny_fp8 import dequantized, write_tiny_fp8
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig
from weights.families import family_of
from weights.families.mixtral import param_specs
from weights.loader import load
from weights.params import ParamKind, ParamSpec, Piece

CPU = torch.device("cpu")
BF16 = replace(TINY_MIXTRAL, dtype="bfloat16")
FP8 = replace(BF16, fp8=True, fp8_experts=True)
E4M3 = torch.float8_e4m3fn
H100 = Card((9, 0), 132)


@pytest.fixture(params=[True, False], ids=["channel", "tensor"])
def tensors(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Tensor]:
    """Of a checkpoint in `tmp_path`; float32 scales, whose products with float8 have to be rounded."""
    return write_tiny_fp8(tmp_path, BF16, per_channel=request.param, scale_dtype=torch.float32)


def give(backend: CpuBackend | ReferenceBackend | TorchBackend | CudaBackend, tensors: dict[str, Tensor]) -> None:
    """Unquantised tensors, in float32."""
    for piece in family_of(BF16).pieces(BF16):
        backend.prepare(piece, tensors[piece.source].float())


def products(backend: CpuBackend | ReferenceBackend | TorchBackend) -> list[Tensor]:
    """Through every parameter that `linear` reads."""
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    dtype = torch.float32 if backend.name == "cpu" else backend.dtype
    return [backend.linear(f"layers.{i}.{name}", x.to(dtype)) for i in range(2) for name in ("qkv", "o", "gate")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [ReferenceBackend, TorchBackend])
def test_dequantised_in_float32_and_rounded_once(
    tmp_path: Path, tensors: dict[str, Tensor], make: type[ReferenceBackend | TorchBackend], dtype: torch.dtype
) -> None:
    specs = param_specs(BF16)
    backend, expected = (make(specs, device=CPU, dtype=dtype) for _ in range(2))
    load(open_checkpoint(tmp_path), backend)
    give(expected, dequantized(tensors))
    for spec in specs:
        assert torch.equal(backend._params[spec.name], expected._params[spec.name]), spec.name


@pytest.mark.parametrize("weight_type", list(WeightType))
def test_the_cpu_kernels_pack_what_the_weights_stand_for(
    tmp_path: Path, tensors: dict[str, Tensor], weight_type: WeightType
) -> None:
    """int8 is made from the float32 products."""
    isa = best()
    assert isa is not None
    dtype = torch.float32 if weight_type is WeightType.float32 else torch.bfloat16
    backend, expected = (CpuBackend(BF16, dtype=dtype, weight_type=weight_type, instruction_set=isa) for _ in range(2))
    load(open_checkpoint(tmp_path), backend)
    give(expected, dequantized(tensors))
    for ours, theirs in zip(products(backend), products(expected), strict=True):
        assert torch.equal(ours, theirs)
    for name in ("layers.0.w13", "layers.1.w2"):
        packed, wanted = backend._packed[name], expected._packed[name]
        assert torch.equal(packed.data.view(torch.uint8), wanted.data.view(torch.uint8))
        assert (packed.scales is None) == (weight_type is not WeightType.int8)


def test_a_store_of_8_bits_keeps_bits_and_scales(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    backend = CudaBackend(FP8, H100, device=CPU, dtype=torch.bfloat16, weight_dtype=E4M3)
    load(open_checkpoint(tmp_path), backend)
    for layer in range(2):
        weights = backend._experts.weights(layer)
        assert weights.w13_scale is not None
        assert weights.w2_scale is not None
        for e in range(4):
            w1, w2, w3 = (f"model.layers.{layer}.block_sparse_moe.experts.{e}.w{i}.weight" for i in (1, 2, 3))
            assert same_bits(weights.w13[e], torch.cat([tensors[w1].view(torch.uint8), tensors[w3].view(torch.uint8)]))
            assert same_bits(weights.w2[e], tensors[w2].view(torch.uint8))
            for rows, name in (
                (weights.w13_scale[e, :48], w1),
                (weights.w13_scale[e, 48:], w3),
                (weights.w2_scale[e], w2),
            ):
                assert torch.equal(rows, tensors[f"{name}_scale"].flatten().expand(rows.shape[0]))
    # The rest of the model is of 16 bits, whatever it came as.
    expected = ParamStore(param_specs(BF16), device=CPU, dtype=torch.bfloat16)
    exact = dequantized(tensors)
    for piece in family_of(BF16).pieces(BF16):
        expected.put(piece, exact[piece.source])
    for name in ("layers.0.qkv", "layers.1.o", "layers.0.gate", "lm_head", "norm"):
        assert torch.equal(backend._params[name], expected[name])


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == E4M3 and torch.equal(actual.view(torch.uint8), expected)


@pytest.mark.parametrize("weight_dtype", [torch.int8, torch.bfloat16], ids=str)
def test_a_store_of_another_dtype_starts_from_the_products(
    tmp_path: Path, tensors: dict[str, Tensor], weight_dtype: torch.dtype
) -> None:
    """int8 where it was asked for or where the card reads no float8; 16 bits where not all experts are of float8."""
    backend = CudaBackend(BF16, H100, device=CPU, dtype=torch.bfloat16, weight_dtype=weight_dtype)
    load(open_checkpoint(tmp_path), backend)
    weights = backend._experts.weights(1)
    exact = dequantized(tensors)["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    if weight_dtype is torch.bfloat16:
        assert weights.w2_scale is None
        assert torch.equal(weights.w2[3], exact.bfloat16())
        return
    numbers, scale = quantize_rows(exact, torch.int8)
    assert weights.w2_scale is not None
    assert torch.equal(weights.w2[3], numbers)
    assert torch.equal(weights.w2_scale[3], scale)


def test_experts_that_come_in_16_bits_are_quantised_beside_them() -> None:
    """As with --quantization fp8, for a checkpoint that leaves some out."""
    specs = [
        ParamSpec("layers.0.w13", (1, 4, 8), ParamKind.EXPERT),
        ParamSpec("layers.0.w2", (1, 8, 2), ParamKind.EXPERT),
    ]
    backend = CudaBackend(FP8, H100, device=CPU, dtype=torch.bfloat16, weight_dtype=E4M3)
    store = type(backend._experts)(specs, device=CPU, dtype=E4M3)
    wide, bits, scale = torch.randn(2, 8), torch.randn(2, 8).to(E4M3), torch.tensor([[0.5], [2.0]])
    store.put(Piece("a", (2, 8), "layers.0.w13", expert=0), wide.bfloat16())
    store.put(Piece("b", (2, 8), "layers.0.w13", expert=0, row=2), bits, scale)
    store.put(Piece("c", (8, 2), "layers.0.w2", expert=0), torch.randn(8, 2))
    weights = store.weights(0)
    assert weights.w13_scale is not None
    assert same_bits(weights.w13[0, 2:], bits.view(torch.uint8))
    assert weights.w13_scale[0, 2:].tolist() == [0.5, 2.0]
    numbers, own = quantize_rows(wide.bfloat16(), E4M3)
    assert same_bits(weights.w13[0, :2], numbers.view(torch.uint8))
    assert torch.equal(weights.w13_scale[0, :2], own)


def test_what_weights_are_held_in() -> None:
    assert held_quantization("cuda", FP8, None) == "fp8"
    assert held_quantization("cuda", FP8, "int8") == "int8"
    assert held_quantization("cuda", FP8, "fp8") == held_quantization("cuda", BF16, "fp8") == "fp8"
    assert held_quantization("cuda", BF16, None) is None
    assert held_quantization("cuda", replace(FP8, fp8_experts=False), None) is None
    for name in ("cpu", "torch", "reference", "auto"):
        assert held_quantization(name, FP8, None) is None
        assert held_quantization(name, FP8, "int8") == "int8"


@pytest.mark.parametrize(
    ("capability", "config", "quantization", "expected", "warnings"),
    [
        ((9, 0), FP8, None, E4M3, 0),
        ((9, 0), FP8, "int8", torch.int8, 0),
        ((9, 0), BF16, None, torch.bfloat16, 0),
        ((8, 0), FP8, None, torch.int8, 2),
    ],
    ids=str,
)
def test_experts_follow_the_checkpoint(
    capability: tuple[int, int],
    config: ModelConfig,
    quantization: str | None,
    expected: torch.dtype,
    warnings: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A card that reads no float8 takes int8, and says so."""
    monkeypatch.setattr(Card, "of", lambda _: Card(capability, 100))
    made: dict[str, object] = {}
    monkeypatch.setattr("engine.backends.cuda.backend.CudaBackend", lambda *_, **options: made.update(options))
    make_backend("cuda", config, device=torch.device("cuda"), dtype=torch.bfloat16, quantization=quantization)
    assert (made["weight_dtype"] or made["dtype"]) == expected
    assert len([record for record in caplog.records if record.name == select.__name__]) == warnings


@pytest.mark.interpreter
def test_the_kernels_multiply_by_the_scales(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of activations in float32 through experts in float8, against the reference's dequantised ones."""
    del tensors  # in the folder
    ids, chunks = [(7 * i + 1) % 64 for i in range(19)], [12, 1, 6]
    expected = paged_logits(load_runner(str(tmp_path), backend="reference"), ids, chunks)

    def make(_: str, config: ModelConfig, *, quantization: str | None, **options: Any) -> CudaBackend:
        weight_dtype = H100.weight_dtype(held_quantization("cuda", config, quantization))
        assert weight_dtype is E4M3
        return CudaBackend(config, H100, weight_dtype=weight_dtype, **options)

    monkeypatch.setattr(startup, "make_backend", make)
    actual = paged_logits(load_runner(str(tmp_path), backend="reference"), ids, chunks)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
