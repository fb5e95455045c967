"""What the compile gates hang on: a launch is bound as the JIT would, and whatever does not fit is seen."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from engine.backends.cuda.launch import Launch
from tests.engine.kernels.compile import WARPGROUP_MMA, assert_fits, compiled
from tests.engine.kernels.handmade import copy, product


def meta(dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(4096, 4096, dtype=dtype, device="meta")


def product_launch(
    *,
    bias: Tensor | None = None,
    block: int = 64,
    columns: int = 64,
    num_warps: int = 4,
    num_stages: int = 2,
    grid: tuple[int, ...] = (1,),
) -> Launch:
    args = {"x": meta(), "y": meta(), "bias": bias, "z": meta(torch.float32), "stride": 4096}
    constexprs = {"BLOCK": block, "COLUMNS": columns, "TURNS": 8}
    return Launch(product, grid, args, constexprs, num_warps=num_warps, num_stages=num_stages)


def copy_launch(stride: int, **more: int) -> Launch:
    args: Mapping[str, Tensor | int | float | None] = {"x": meta(), "y": meta(), "stride": stride, **more}
    return Launch(copy, (7,), args, {"BLOCK": 1024}, num_warps=4, num_stages=1)


def test_a_product_of_each_card() -> None:
    hopper, ampere = compiled(product_launch(), 90), compiled(product_launch(), 80)
    for code in (hopper, ampere):
        assert 32 < code.registers < 255
        assert code.spills == 0
        assert 16_000 < code.shared_bytes < 66_000
        assert code.name == "product"
    assert_fits(hopper, 90, mma=WARPGROUP_MMA)
    assert_fits(ampere, 80, mma="HMMA")
    with pytest.raises(AssertionError, match="and no HGMMA"):
        assert_fits(ampere, 80, mma=WARPGROUP_MMA)


def test_spills_are_seen() -> None:
    code = compiled(product_launch(columns=256, num_warps=1), 80)
    assert code.spills > 0
    with pytest.raises(AssertionError, match="spills"):
        assert_fits(code, 80)


def test_too_much_shared_memory_is_seen() -> None:
    launch = product_launch(block=128, columns=128, num_warps=8, num_stages=3)
    code = compiled(launch, 90)
    assert 166_912 < code.shared_bytes <= 232_448
    assert_fits(code, 90)
    with pytest.raises(AssertionError, match="bytes shared"):
        assert_fits(code, 80)


def test_too_large_a_grid_is_seen() -> None:
    with pytest.raises(AssertionError, match="65536"):
        compiled(product_launch(grid=(1, 65536)), 90)


def test_ints_divisible_by_16_make_wide_loads() -> None:
    widths = [set(re.findall(r"LDG\.E\.?(\w*)", compiled(copy_launch(stride), 90).sass)) for stride in (4096, 4095)]
    assert widths[0] == {"128"}
    assert "128" not in widths[1]


def test_what_is_none_is_not_loaded() -> None:
    with_bias = compiled(product_launch(bias=torch.empty(64, device="meta")), 90)
    without = compiled(product_launch(), 90)
    assert len(without.sass) < len(with_bias.sass)


def test_arguments_must_fit() -> None:
    with pytest.raises(KeyError, match="more"):
        compiled(copy_launch(16, more=1), 90)
