"""A checkpoint whose routers were set by hand: the token id alone decides who serves it, and what comes next.

Attention and experts give nothing, so that a token's hidden state stays its embedding, one dimension of its own. The
gate of a layer reads its log probabilities from that dimension, and the vocabulary projection prefers the next id.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.types import Steering, TokenRouting
from tests.tiny import write_tiny_mixtral

VOCAB, LAYERS, EXPERTS, TOP_K = 32, 2, 4, 2
SHARES = (0.6, 0.25, 0.1, 0.05)
"""Gate probabilities of every token in every layer, best expert first."""
ENTROPY = -sum(share * math.log(share) for share in SHARES)


def ranking(layer: int, token: int) -> list[int]:
    """The experts, from the most to the least probable. Layer 0 takes them in turn; in layer 1 tokens under 16 prefer
    expert 3, then 0, the others expert 1, then 0."""
    if layer == 0:
        return [(token + place) % EXPERTS for place in range(EXPERTS)]
    return [3, 0, 1, 2] if token < 16 else [1, 0, 3, 2]


def probabilities(layer: int, token: int) -> list[float]:
    order = ranking(layer, token)
    return [SHARES[order.index(expert)] for expert in range(EXPERTS)]


def chosen(layer: int, token: int, steering: Steering | None = None) -> list[int]:
    """Whom the router picks, best first."""
    steering = steering or Steering()
    forbidden = {expert for where, experts in steering.forbidden if where in (None, layer) for expert in experts}
    shares = probabilities(layer, token)
    allowed = [expert for expert in ranking(layer, token) if expert not in forbidden]
    most = shares[allowed[0]]
    return [e for e in allowed[: steering.experts_per_token or TOP_K] if shares[e] >= steering.min_p * most]


def routing_of(token: int, steering: Steering | None = None) -> TokenRouting:
    """The trace of one token."""
    expert_ids = tuple(tuple(chosen(layer, token, steering)) for layer in range(LAYERS))
    weights = []
    for layer, experts in enumerate(expert_ids):
        shares = [probabilities(layer, token)[expert] for expert in experts]
        weights.append(tuple(share / sum(shares) for share in shares))
    return TokenRouting(expert_ids, tuple(weights), (ENTROPY,) * LAYERS)


def following(token: int, count: int) -> list[int]:
    """The greedy continuation."""
    return [(token + 1 + step) % VOCAB for step in range(count)]


def write_handmade(folder: Path, *, random_tokens: bool = False) -> None:
    """With `random_tokens` the vocabulary projection is zero, so that sampling draws any token."""
    write_tiny_mixtral(folder, vocab_size=VOCAB, max_position_embeddings=8192)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    scale = math.sqrt(VOCAB)  # what RMSNorm makes of an embedding with one dimension that is not 0
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.fill_(1.0)
        elif name.endswith(("o_proj.weight", "w2.weight")):
            tensor.zero_()
    tensors["model.embed_tokens.weight"] = 1000 * torch.eye(VOCAB)
    successor = torch.eye(VOCAB).roll(1, dims=0)  # row (t + 1) % V reads the dimension of t
    tensors["lm_head.weight"] = torch.zeros(VOCAB, VOCAB) if random_tokens else successor
    for layer in range(LAYERS):
        gates = torch.tensor([probabilities(layer, token) for token in range(VOCAB)]).log() / scale
        tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = gates.T.contiguous()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
