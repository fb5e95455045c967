"""Sizes of a model, from its configuration alone: parameters, bytes of weights, bytes of a token in the KV cache."""

from __future__ import annotations

import math

from engine.activations import ITEMSIZE
from weights.config import ModelConfig
from weights.families import mixtral
from weights.params import ParamKind, ParamSpec

_SCALE = 4
"""Bytes of the scale that each row of a quantised matrix has."""


def weight_bytes(spec: ParamSpec, *, backend: str, dtype: str, quantization: str | None) -> int:
    """Bytes of a parameter as `backend` holds it.

    Norms and routers are never quantised, and on the CPU they are float32: next to nothing, and what they decide is
    decided for good. Backend cuda quantises the experts alone. A quantised matrix has a float32 scale for each row.

    Example, w2 of a layer of Mixtral 8x7B [8, 4096, 14336] in fp8: 469,762,048 + 4 * 8 * 4096 = 469,893,120.
    """
    num_elements = math.prod(spec.shape)
    if spec.kind in (ParamKind.NORM, ParamKind.ROUTER):
        return num_elements * (4 if backend == "cpu" else ITEMSIZE[dtype])
    if quantization is None or (backend == "cuda" and spec.kind is not ParamKind.EXPERT):
        return num_elements * ITEMSIZE[dtype]
    return num_elements + _SCALE * math.prod(spec.shape[:-1])


def params_by_kind(config: ModelConfig) -> dict[ParamKind, int]:
    """Number of parameters of each kind, in the order of `ParamKind`; kinds without any are left out."""
    counts = dict.fromkeys(ParamKind, 0)
    for spec in mixtral.param_specs(config):
        counts[spec.kind] += math.prod(spec.shape)
    return {kind: count for kind, count in counts.items() if count}


def active_params(config: ModelConfig) -> int:
    """Parameters of one token's forward pass: everything shared, and K of the E experts of each layer.

    The whole embedding counts, as it does in the figures models are known by: 12,879,925,248 for Mixtral 8x7B.
    """
    counts = params_by_kind(config)
    experts = counts.get(ParamKind.EXPERT, 0)
    return sum(counts.values()) - experts + experts * config.num_experts_per_tok // config.num_experts


def kv_bytes_per_token(config: ModelConfig, dtype: str, kv_cache_dtype: str = "auto") -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers.

    Mixtral 8x7B in bfloat16: 2 (K and V) * 32 layers * 8 KV heads * 128 * 2 bytes = 131,072; in fp8 half of it.
    """
    size = 1 if kv_cache_dtype == "fp8" else ITEMSIZE[dtype]
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * size
