"""Kernels for the tests of the compile harness."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(x, y, bias, z, stride, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, TURNS: tl.constexpr):
    """z = x @ y + bias, in turns."""
    rows = tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for turn in range(TURNS):
        a = tl.load(x + rows[:, None] * stride + turn * BLOCK + rows[None, :])
        b = tl.load(y + (turn * BLOCK + rows)[:, None] * stride + columns[None, :])
        total = tl.dot(a, b, total)
    if bias is not None:
        total += tl.load(bias + columns)[None, :]
    tl.store(z + rows[:, None] * stride + columns[None, :], total)


@triton.jit
def copy(x, y, stride, BLOCK: tl.constexpr):
    at = tl.program_id(0) * stride + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))
