"""Norms, rotary positions and the write into the cache compile for the cards, at the sizes of Mixtral and larger."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.backends.base import AttentionShape
from engine.backends.cuda.launch import Launch
from engine.backends.cuda.rows import add_rms_norm_launch, rms_norm_launch, rotary_write_launch
from tests.engine.kernels.compile import assert_fits, compiled

EPS = 1e-5
CARDS = [(90, torch.bfloat16), (90, torch.float16), (90, torch.float32), (80, torch.bfloat16), (80, torch.float16)]

cards = pytest.mark.parametrize(("capability", "dtype"), CARDS, ids=str)


def meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def rotary_launch(shape: AttentionShape, dtype: torch.dtype, cache_dtype: torch.dtype) -> Launch:
    width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    angles = [meta(64, shape.head_dim // 2, dtype=torch.float32) for _ in range(2)]
    cache = [meta(100, 16, shape.num_kv_heads, shape.head_dim, dtype=cache_dtype) for _ in range(2)]
    return rotary_write_launch(
        meta(64, width, dtype=dtype), angles[0], angles[1], meta(64, dtype=torch.int64), cache[0], cache[1], shape
    )


@pytest.mark.parametrize("hidden_size", [4096, 16384])
@cards
def test_norms(capability: int, dtype: torch.dtype, hidden_size: int) -> None:
    x, weight = meta(64, hidden_size, dtype=dtype), meta(hidden_size, dtype=dtype)
    normed, rows = meta(7, hidden_size, dtype=dtype), meta(7, dtype=torch.int64)
    for launch in (
        rms_norm_launch(x, weight, EPS, x),
        add_rms_norm_launch(x, x, weight, EPS, x),
        rms_norm_launch(x, weight, EPS, normed, rows=rows),
    ):
        assert_fits(compiled(launch, capability), capability)


@pytest.mark.parametrize("heads", [(32, 8), (64, 1)], ids=str)
@cards
def test_rotary_write(capability: int, dtype: torch.dtype, heads: tuple[int, int]) -> None:
    shape = AttentionShape(num_heads=heads[0], num_kv_heads=heads[1], head_dim=128, sliding_window=None)
    assert_fits(compiled(rotary_launch(shape, dtype, dtype), capability), capability)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotary_write_into_8_bits(dtype: torch.dtype) -> None:
    shape = AttentionShape(num_heads=32, num_kv_heads=8, head_dim=128, sliding_window=None)
    code = compiled(rotary_launch(shape, dtype, torch.float8_e4m3fn), 90)
    assert_fits(code, 90, mma=None)
    assert "E4M3" in code.sass
