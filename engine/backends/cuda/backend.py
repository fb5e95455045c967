"""CudaBackend: Triton's kernels around the products of cuBLAS, on one GPU.

Activations, the residual stream among them, and the gate's logits have the model's dtype; sums are float32.
Nothing in a step waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.base import AttentionShape, KVCache
from engine.backends.cuda.attention import MAX_HEAD_DIM, AttentionTiles, attention
from engine.backends.cuda.card import OLDEST, Card
from engine.backends.cuda.moe import experts
from engine.backends.cuda.routing import ExpertBlocks, group_blocks, route
from engine.backends.cuda.rows import add_rms_norm_launch, rms_norm_launch, rotary_angles, rotary_write_launch
from engine.backends.cuda.store import ExpertStore
from engine.backends.cuda.tiles import TileTable
from engine.backends.store import ParamStore
from engine.batch import Batch
from engine.layers.rotary import inverse_frequencies
from engine.routing.base import Routing, RoutingInputs
from engine.routing.record import RoutingRecord
from weights.config import ModelConfig
from weights.families.mixtral import param_specs
from weights.params import ParamKind, Piece


def why_not(config: ModelConfig, card: Card) -> str | None:
    """What keeps these kernels from running a model on a card, in a few words; None if nothing does."""
    if card.capability < OLDEST:
        oldest, own = (".".join(map(str, capability)) for capability in (OLDEST, card.capability))
        return f"they are for compute capability {oldest} and newer, this card has {own}"
    if config.head_dim % 2:
        return f"a head of {config.head_dim} has no halves to rotate"
    if config.head_dim > MAX_HEAD_DIM:
        return f"a head of {config.head_dim} is more than the {MAX_HEAD_DIM} of the attention kernel"
    return None


@dataclass(frozen=True, slots=True)
class _GroupedRouting(Routing):
    """A routing whose kernel grouped it for the experts."""

    blocks: ExpertBlocks


class CudaBackend:
    """See `BlockBackend`."""

    name = "cuda"

    def __init__(
        self,
        config: ModelConfig,
        card: Card,
        *,
        device: torch.device,
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None,
    ) -> None:
        """`weight_dtype`: of the experts, torch.int8 or torch.float8_e4m3fn; None: `dtype`."""
        assert why_not(config, card) is None
        self.device = device
        self.dtype = dtype
        self.has_fp8_kv_cache = card.reads_fp8
        self._config = config
        weight_dtype = weight_dtype or dtype
        specs = param_specs(config)
        experts = [spec for spec in specs if spec.kind is ParamKind.EXPERT]
        self._params = ParamStore(specs, device=device, dtype=dtype)
        self._experts = ExpertStore(experts, device=device, dtype=weight_dtype)
        self._expert_names = frozenset(spec.name for spec in experts)
        self._expert_tiles = TileTable.load(
            capability=card.capability,
            dtype=dtype,
            weight_dtype=weight_dtype,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
        )
        self._shape = AttentionShape(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            sliding_window=config.sliding_window,
        )
        self._attention_tiles = AttentionTiles.of(card, self._shape, dtype)
        self._inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, device)
        self._angles: tuple[Tensor, Tensor]

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        store = self._experts if piece.param in self._expert_names else self._params
        store.put(piece, tensor, scale)

    def has(self, param: str) -> bool:
        return param in self._params or param in self._experts

    def new_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype | None = None
    ) -> KVCache:
        return KVCache.zeros(num_layers, num_blocks, block_size, shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def weight_bytes(self) -> int:
        return self._params.num_bytes + self._experts.num_bytes

    def embed(self, param: str, input_ids: Tensor) -> Tensor:
        return F.embedding(input_ids, self._params[param])

    def linear(self, param: str, x: Tensor) -> Tensor:
        return F.linear(x, self._params[param])

    def logits(self, param: str, x: Tensor) -> Tensor:
        return F.linear(x, self._params[param]).float()

    def rms_norm(self, param: str, x: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        normed = torch.empty_like(x) if rows is None else x.new_empty(rows.shape[0], x.shape[1])
        rms_norm_launch(x, self._params[param], eps, normed, rows=rows).run()
        return normed

    def attention_block(self, layer: int, x: Tensor, batch: Batch, cache: KVCache) -> tuple[Tensor, Tensor]:
        name, shape = f"layers.{layer}", self._shape
        keys, values = cache.keys[layer], cache.values[layer]
        if layer == 0:
            self._angles = rotary_angles(batch.positions, self._inv_freq)  # of all layers of the step
        normed = self.rms_norm(f"{name}.input_norm", x, self._config.rms_norm_eps)
        qkv = self.linear(f"{name}.qkv", normed)
        rotary_write_launch(qkv, *self._angles, batch.slot_mapping, keys, values, shape).run()
        query = qkv.view(qkv.shape[0], -1, shape.head_dim)[:, : shape.num_heads]
        attended = attention(query, keys, values, batch, shape, self._attention_tiles)
        projected = self.linear(f"{name}.o", attended)
        weight = self._params[f"{name}.post_attention_norm"]
        add_rms_norm_launch(x, projected, weight, self._config.rms_norm_eps, normed).run()
        return normed, self.linear(f"{name}.gate", normed)

    def route(
        self, layer: int, logits: Tensor, inputs: RoutingInputs, *, renormalize: bool, record: RoutingRecord | None
    ) -> Routing:
        block_m = self._expert_tiles.choose(logits.shape[0]).block_m
        routing, blocks = route(logits, layer, inputs, renormalize=renormalize, block_m=block_m, record=record)
        return _GroupedRouting(routing.expert_ids, routing.weights, routing.logits, routing.chosen_ids, blocks)

    def moe_block(self, layer: int, normed: Tensor, routing: Routing, x: Tensor) -> None:
        tiles = self._expert_tiles.choose(x.shape[0])
        expert_ids, weights = routing.expert_ids.contiguous(), routing.weights.contiguous()
        if isinstance(routing, _GroupedRouting):
            blocks = routing.blocks
        else:
            blocks = group_blocks(expert_ids, self._config.num_experts, tiles.block_m)
        experts(normed, self._experts.weights(layer), expert_ids, weights, blocks, x, tiles)
