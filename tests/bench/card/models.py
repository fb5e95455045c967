"""The models that are run: Mixtral 8x7B, as deep as memory allows, and a tiny one."""

from __future__ import annotations

import dataclasses

import torch

from engine.plan import plan_model
from weights.config import ModelConfig

MIXTRAL_8X7B = ModelConfig(
    model_type="mixtral",
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    num_experts=8,
    num_experts_per_tok=2,
    rope_theta=1e6,
)
# Small enough for the reference backend; sizes are multiples of 8, which grouped GEMMs need.
TINY = dataclasses.replace(
    MIXTRAL_8X7B,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    num_experts=6,
    dtype="float32",
)
TINY_CACHE_BYTES = 1 << 20


def as_deep_as_fits(
    device: torch.device, num_tokens: int, quantization: str | None = None, kv_cache_dtype: str = "auto"
) -> ModelConfig:
    """Mixtral 8x7B with as many of its 32 layers as leave room for `num_tokens` tokens of KV cache."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    for num_layers in range(MIXTRAL_8X7B.num_layers, 0, -1):
        config = dataclasses.replace(MIXTRAL_8X7B, num_layers=num_layers)
        plan = plan_model(
            config,
            quantization=quantization,
            kv_cache_dtype=kv_cache_dtype,
            memory_bytes=free,
            max_model_len=4096,
        )
        if plan.fits and plan.max_kv_tokens >= num_tokens:
            return config
    raise RuntimeError("not even one layer of Mixtral 8x7B fits: use --tiny")
