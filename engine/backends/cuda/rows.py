"""Launches of the kernels that work row by row: norms, rotary positions, the write into the cache.

Dimensions as in engine/backends/base.py.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton import next_power_of_2

from engine.backends.base import AttentionShape
from engine.backends.cuda.launch import Launch
from engine.kernels.triton.rows import add_rms_norm, rotary_write


def rms_norm_launch(x: Tensor, weight: Tensor, eps: float, normed: Tensor, *, rows: Tensor | None = None) -> Launch:
    """normed = x / rms(x) * weight: of all rows of x [T, D] into normed [T, D], or of `rows` [R] int64 into [R, D]."""
    return _norm_launch(x, None, rows, weight, eps, normed)


def add_rms_norm_launch(x: Tensor, y: Tensor, weight: Tensor, eps: float, normed: Tensor) -> Launch:
    """x += y in place, then normed = x / rms(x) * weight: all [T, D]."""
    return _norm_launch(x, y, None, weight, eps, normed)


def _norm_launch(
    x: Tensor, y: Tensor | None, rows: Tensor | None, weight: Tensor, eps: float, normed: Tensor
) -> Launch:
    tensors = [tensor for tensor in (x, y, rows, weight, normed) if tensor is not None]
    assert all(tensor.is_contiguous() for tensor in tensors)
    block = next_power_of_2(x.shape[1])
    return Launch(
        add_rms_norm,
        grid=(normed.shape[0],),
        args={"x": x, "y": y, "rows": rows, "weight": weight, "normed": normed, "eps": eps},
        constexprs={"HIDDEN_SIZE": x.shape[1], "BLOCK": block},
        num_warps=min(max(block // 512, 1), 16),  # 16 columns a thread
        num_stages=1,
    )


def rotary_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position times every frequency, which all layers share: [T] and [N/2] float32 ->
    [T, N/2] float32 each."""
    angles = positions.float().unsqueeze(-1) * inv_freq
    return angles.cos(), angles.sin()


def rotary_write_launch(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    slot_mapping: Tensor,
    keys: Tensor,
    values: Tensor,
    shape: AttentionShape,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Launch:
    """Of qkv [T, (H + 2G) * N], rotate the query heads in place and write keys, rotated, and values into their slots of
    one layer's cache, `keys` and `values` [num_blocks, block_size, G, N].

    slot_mapping [T] int64 has -1 in rows whose keys and values are not written. What is not finite is written as 0. A
    cache of e4m3 takes k / k_scale and v / v_scale, clamped to what that has.
    """
    tensors = (qkv, cos, sin, slot_mapping, keys, values)
    assert all(tensor.is_contiguous() for tensor in tensors)
    narrow = keys.dtype == torch.float8_e4m3fn
    heads, half = next_power_of_2(shape.num_heads // shape.num_kv_heads), next_power_of_2(shape.head_dim // 2)
    return Launch(
        rotary_write,
        grid=(qkv.shape[0], shape.num_kv_heads),
        args={
            "qkv": qkv,
            "cos": cos,
            "sin": sin,
            "slot_mapping": slot_mapping,
            "keys": keys,
            "values": values,
            "key_factor": 1 / k_scale if narrow else None,
            "value_factor": 1 / v_scale if narrow else None,
        },
        constexprs={
            "NUM_HEADS": shape.num_heads,
            "NUM_KV_HEADS": shape.num_kv_heads,
            "HEAD_DIM": shape.head_dim,
            "HEADS": heads,
            "HALF": half,
        },
        num_warps=min(max(heads * half // 256, 1), 8),  # 8 pairs a thread
        num_stages=1,
    )
