"""Mixtral (Jiang et al. 2024, arXiv 2401.04088): grouped-query attention, and in every layer top-K of E SwiGLU
experts.
"""

from __future__ import annotations

from engine.backends.base import AttentionShape, BlockBackend, LayerBackend
from engine.layers.attention import Attention
from engine.layers.fused import FusedLayer
from engine.layers.moe import MoELayer
from engine.layers.rotary import inverse_frequencies
from engine.models.decoder import Decoder, DecoderLayer, Layer
from engine.routing.base import Router
from weights.config import ModelConfig


def build(config: ModelConfig, backend: LayerBackend | BlockBackend, router: Router) -> Decoder:
    """The decoder of `config` over weights that `backend` holds or will hold; every layer routes by `router`."""
    shape = AttentionShape(
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        sliding_window=config.sliding_window,
    )
    layers: list[Layer]
    if isinstance(backend, BlockBackend):
        layers = [FusedLayer(backend, layer, router) for layer in range(config.num_layers)]
    else:
        layers = _layers(config, backend, shape, router)
    lm_head = "embed_tokens" if config.tie_word_embeddings else "lm_head"
    return Decoder(backend, layers, shape, config.rms_norm_eps, lm_head)


def _layers(config: ModelConfig, backend: LayerBackend, shape: AttentionShape, router: Router) -> list[Layer]:
    inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, backend.device)
    return [
        DecoderLayer(
            backend,
            Attention(backend, layer, shape, inv_freq),
            MoELayer(backend, layer, config.num_experts, router),
            config.rms_norm_eps,
        )
        for layer in range(config.num_layers)
    ]
