"""Tensors of float8 e4m3 and their scales, as llm-compressor (compressed-tensors) and AutoFP8 lay them out.

`X.weight` [rows, in] float8_e4m3fn stands for X.weight * X.weight_scale. The scale has any float dtype and the shape
[] or [1], one for the tensor, or [rows, 1], one for each output channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weights.config import ModelConfig
from weights.errors import refuse
from weights.families import family_of
from weights.params import Piece

if TYPE_CHECKING:
    from weights.checkpoint import Checkpoint, TensorInfo

E4M3 = torch.float8_e4m3fn

_UNREAD = frozenset({"input_scale", "output_scale", "q_scale", "k_scale", "v_scale", "kv_scale"})


def scale_names(config: ModelConfig, pieces: Mapping[str, Piece], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Weight -> its scale, by name, for every piece that is a matrix of float8; without `config.fp8` none is read as
    such.

    Example: "model.layers.0.self_attn.q_proj.weight" -> "model.layers.0.self_attn.q_proj.weight_scale".
    """
    if not config.fp8:
        return {}
    return {
        name: f"{name}_scale" for name, piece in pieces.items() if tensors[name].dtype == E4M3 and len(piece.shape) == 2
    }


def scale_shapes(rows: int) -> tuple[tuple[int, ...], ...]:
    """The shapes that the scale of a matrix of `rows` rows may have."""
    return (), (1,), (rows, 1)


def is_unread_scale(config: ModelConfig, pieces: Mapping[str, Piece], name: str) -> bool:
    """Known left-overs of such a checkpoint: static scales of a layer's activations, and of keys and values.

    Weights of 8 bits do not need the former, and the KV cache has scales of its own.
    """
    module, _, leaf = name.rpartition(".")
    if not config.fp8 or leaf not in _UNREAD:
        return False
    return f"{module}.weight" in pieces or (module.endswith(".self_attn") and f"{module}.k_proj.weight" in pieces)


def all_experts_fp8(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether every expert's weight that is there is float8."""
    pieces = family_of(config).pieces(config)
    names = [piece.source for piece in pieces if piece.expert is not None and piece.source in tensors]
    return config.fp8 and all(tensors[name].dtype == E4M3 for name in names)


def read_scales(checkpoint: Checkpoint, names: Mapping[str, str], pieces: Mapping[str, Piece]) -> dict[str, Tensor]:
    """The scales called `names` (weight -> scale) by weight, each spread over its rows: float32 [rows, 1].

    Raises CheckpointError when one is not a positive finite number, as what was never calibrated is not.
    """
    if not names:
        return {}
    weights = {scale: weight for weight, scale in names.items()}
    result: dict[str, Tensor] = {}
    for scale, tensor in checkpoint.read(weights):
        rows = pieces[weights[scale]].shape[0]
        result[weights[scale]] = tensor.float().reshape(-1, 1).expand(rows, 1).clone()
    refuse(
        "with values that are not positive and finite",
        (names[weight] for weight, scale in result.items() if not bool(((scale > 0) & scale.isfinite()).all())),
    )
    return result


def dequantize(tensor: Tensor, scale: Tensor, device: torch.device | None = None) -> Tensor:
    """tensor [rows, in] float8_e4m3fn times scale [rows, 1] float32, as float32, on `device` (None: where they are)."""
    if device is not None:  # 8 bits travel, not 32
        tensor, scale = tensor.to(device, non_blocking=True), scale.to(device, non_blocking=True)
    return tensor.float() * scale
