"""Tiny random checkpoints that other people's libraries read too."""

from __future__ import annotations

import json
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights.checkpoint import TensorInfo
from weights.config import ModelConfig, hf_config
from weights.families import family_of
from weights.families.mixtral import param_specs
from weights.params import ParamKind, Piece
from weights.seeds import named_generator
from weights.writer import ShardWriter, shard_names

TINY_MIXTRAL = ModelConfig(
    model_type="mixtral",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    num_experts=4,
    num_experts_per_tok=2,
    dtype="float32",
)
TINY_LLAMA = replace(TINY_MIXTRAL, model_type="llama", num_experts=1, num_experts_per_tok=1)


def write_tiny_mixtral(
    folder: Path, config: ModelConfig = TINY_MIXTRAL, *, seed: int = 0, shards: int = 1, **overrides: Any
) -> ModelConfig:
    """Writes a random Mixtral (or dense: `config=TINY_LLAMA`) to `folder`, in its config's dtype; returns the config.

    `overrides` are fields of ModelConfig; hidden_size or num_heads alone leave head_dim as it is. The values depend on
    the seed and the tensor's name only. Every expert differs; activations, router logits and vocabulary logits have a
    standard deviation of about one or more, so that routing is uneven and greedy tokens vary.
    """
    config = replace(config, **overrides)
    tensors = tiny_tensors(config, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(config), indent=2), encoding="utf-8")
    infos = {name: TensorInfo(tuple(t.shape), t.dtype, t.nbytes) for name, t in tensors.items()}
    limit = _limit(infos, shards)
    with ShardWriter(folder, infos, max_shard_bytes=limit) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return config


def tiny_tensors(config: ModelConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """The tensors of such a checkpoint by name, in the config's dtype."""
    kinds = {spec.name: spec.kind for spec in param_specs(config)}
    return {
        piece.source: _random(config, piece, kinds[piece.param], seed) for piece in family_of(config).pieces(config)
    }


def _random(config: ModelConfig, piece: Piece, kind: ParamKind, seed: int) -> Tensor:
    generator = named_generator(seed, piece.source)
    values = torch.randn(piece.shape, generator=generator)
    if kind is ParamKind.NORM:
        values = 1 + 0.1 * values
    elif kind is ParamKind.LM_HEAD:
        values *= 3 / config.hidden_size**0.5
    elif kind is not ParamKind.EMBEDDING:
        values /= piece.shape[-1] ** 0.5
    return values.to(getattr(torch, config.dtype))


def _limit(infos: dict[str, TensorInfo], shards: int) -> int:
    """The smallest shard size that gives at most `shards` files: a larger one never gives more."""
    sizes = range(sum(info.nbytes for info in infos.values()) + 1)
    return bisect_left(sizes, True, key=lambda limit: len(shard_names(infos, limit)) <= shards)
