"""CpuBackend: the kernels of engine/kernels/cpu over packed weights.

Activations are float32 throughout; products read them in bfloat16 beside bfloat16 weights, in 16 bits beside int8.
Weights are packed piece by piece as they are loaded, and no other copy is kept.
"""

from __future__ import annotations

from ctypes import byref
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.backends.base import AttentionShape, KVCache
from engine.backends.host_memory import host_zeros
from engine.backends.store import ParamStore
from engine.batch import Batch
from engine.kernels.cpu.library import InstructionSet, LayerWeights, ModelShape, Steering, Step, WeightType, load
from engine.layers.rotary import inverse_frequencies
from engine.routing.base import Routing, RoutingInputs
from engine.routing.record import RoutingRecord
from weights.config import ModelConfig
from weights.families.mixtral import param_specs
from weights.fp8 import dequantize
from weights.params import ParamKind, Piece

_LANES = 16
"""Columns of a block of packed weights."""

_MOST_INT8_PRODUCTS = 65536
"""Longest sum whose products of bytes surely fit into 32 bits (engine/kernels/cpu/bytes.h)."""


def why_not(config: ModelConfig, dtype: torch.dtype, *, int8: bool = False) -> str | None:
    """What keeps these kernels from running a model, in a few words; None if nothing does."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"they compute in float32 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if config.head_dim % 2:
        return f"a head of {config.head_dim} has no halves to rotate"
    longest = max(config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim)
    if int8 and longest > _MOST_INT8_PRODUCTS:
        return f"int8 products of {longest:,} numbers do not fit into 32 bits"
    return None


@dataclass(frozen=True, slots=True)
class PackedParam:
    """Matrices of `num_rows` rows of `size` each, one after another, in blocks of 16 rows (engine/kernels/cpu/gemm.h).

    With `interleaved`, the first and second half of the rows alternate by blocks: gate and up of an expert.
    """

    data: Tensor
    scales: Tensor | None  # float32, a row each, of int8 weights
    num_rows: int
    size: int
    interleaved: bool

    @property
    def num_blocks(self) -> int:
        """Of one matrix."""
        return _num_blocks(self.num_rows, interleaved=self.interleaved)


class CpuBackend:
    """See `BlockBackend`."""

    name = "cpu"
    has_fp8_kv_cache = False

    def __init__(
        self, config: ModelConfig, *, dtype: torch.dtype, weight_type: WeightType, instruction_set: InstructionSet
    ) -> None:
        assert why_not(config, dtype, int8=weight_type is WeightType.int8) is None
        self.device = torch.device("cpu")
        self.dtype = dtype
        self._config = config
        self._head_stride = -(-config.head_dim // _LANES) * _LANES
        self._weight_type = weight_type
        self._library = load(instruction_set)
        self._workspace = self._library.new_workspace()
        specs = param_specs(config)
        self._specs = {spec.name: spec for spec in specs}
        self._plain = ParamStore(specs, device=self.device, dtype=torch.float32)
        self._packed: dict[str, PackedParam] = {}
        self._layers: dict[int, LayerWeights] = {}
        self._step: tuple[Batch, Step, tuple[Tensor, ...]] | None = None
        self._inv_freq = inverse_frequencies(config.head_dim, config.rope_theta, self.device)
        self._shape = ModelShape(
            hidden=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            head_stride=self._head_stride,
            num_experts=config.num_experts,
            intermediate=config.intermediate_size,
            window=config.sliding_window or 0,
            weight_type=weight_type,
            cache_type=WeightType.bfloat16 if dtype == torch.bfloat16 else WeightType.float32,
            eps=config.rms_norm_eps,
        )

    def __del__(self) -> None:
        self._library.free_workspace(self._workspace)

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        if scale is not None:
            tensor = dequantize(tensor, scale)
        if self._specs[piece.param].kind in (ParamKind.NORM, ParamKind.ROUTER):
            self._plain.put(piece, tensor)
            return
        if piece.param not in self._packed:
            self._packed[piece.param] = self._allocate(piece.param)
        param = self._packed[piece.param]
        rows = tensor.to("cpu", torch.bfloat16 if tensor.dtype == torch.bfloat16 else torch.float32).contiguous()
        first_block = (piece.expert or 0) * param.num_blocks
        if piece.param.endswith(".qkv"):
            first_head = piece.row // self._config.head_dim
            for head, own in enumerate(rows.view(-1, self._config.head_dim, param.size), start=first_head):
                self._pack(param, own, first_row=head * self._head_stride)
        elif param.interleaved:
            half, first_row = divmod(piece.row, param.num_rows // 2)
            assert first_row + rows.shape[0] <= param.num_rows // 2, "a piece is gate or up, not both"
            self._pack(param, rows, first_row=first_row, first_block=first_block + half, stride=2)
        else:
            self._pack(param, rows, first_row=piece.row, first_block=first_block)

    def _pack(self, param: PackedParam, rows: Tensor, *, first_row: int, first_block: int = 0, stride: int = 1) -> None:
        """Row r goes to block first_block + (first_row + r) // 16 * stride. The lanes after the last row become 0."""
        assert first_row % _LANES == 0
        self._library.pack(
            rows.data_ptr(),
            rows.dtype == torch.bfloat16,
            rows.shape[0],
            param.size,
            first_row,
            first_block,
            stride,
            self._weight_type,
            param.data.data_ptr(),
            _address(param.scales),
        )

    def has(self, param: str) -> bool:
        return param in self._plain or param in self._packed

    def new_kv_cache(
        self, num_layers: int, num_blocks: int, block_size: int, shape: AttentionShape, dtype: torch.dtype | None = None
    ) -> KVCache:
        assert dtype is None, "it has no other"
        # A head that is no multiple of 16, as no real model has, takes more than was planned.
        padded = replace(shape, head_dim=self._head_stride)
        return KVCache.zeros(num_layers, num_blocks, block_size, padded, dtype=self.dtype, device=self.device)

    @property
    def weight_bytes(self) -> int:
        packed = self._packed.values()
        tensors = [tensor for param in packed for tensor in (param.data, param.scales) if tensor is not None]
        return self._plain.num_bytes + sum(tensor.nbytes for tensor in tensors)

    def embed(self, param: str, input_ids: Tensor) -> Tensor:
        packed = self._packed[param]
        x = torch.empty(input_ids.shape[0], packed.size)
        self._library.embed(
            packed.data.data_ptr(),
            _address(packed.scales),
            self._weight_type,
            packed.size,
            input_ids.data_ptr(),
            x.shape[0],
            x.data_ptr(),
        )
        return x

    def linear(self, param: str, x: Tensor) -> Tensor:
        if param in self._plain:
            return F.linear(x, self._plain[param])
        packed, x = self._packed[param], x.contiguous()
        y = torch.empty(x.shape[0], packed.num_rows)
        self._library.linear(
            x.data_ptr(),
            x.shape[0],
            packed.size,
            packed.data.data_ptr(),
            _address(packed.scales),
            self._weight_type,
            packed.num_rows,
            y.data_ptr(),
            self._workspace,
        )
        return y

    def logits(self, param: str, x: Tensor) -> Tensor:
        return self.linear(param, x)

    def rms_norm(self, param: str, x: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        x = x if rows is None else x[rows]
        y = torch.empty_like(x)
        weight = self._plain[param]
        self._library.rms_norm(x.data_ptr(), weight.data_ptr(), x.shape[0], x.shape[1], eps, y.data_ptr())
        return y

    def attention_block(self, layer: int, x: Tensor, batch: Batch, cache: KVCache) -> tuple[Tensor, Tensor]:
        """Add attention(norm(x)) to x [T, D] in place, and write this step's keys and values into the cache.

        Returns norm(x) [T, D] of the result, by the norm after attention, and the gate's logits [T, E] for it.
        """
        normed = torch.empty_like(x)
        gate_logits = torch.empty(x.shape[0], self._config.num_experts)
        self._library.attention_block(
            byref(self._shape),
            byref(self._weights_of(layer)),
            byref(self._step_of(batch, cache.block_size)),
            x.data_ptr(),
            cache.keys[layer].data_ptr(),
            cache.values[layer].data_ptr(),
            normed.data_ptr(),
            gate_logits.data_ptr(),
            self._workspace,
        )
        return normed, gate_logits

    def route(
        self, layer: int, logits: Tensor, inputs: RoutingInputs, *, renormalize: bool, record: RoutingRecord | None
    ) -> Routing:
        """As `TopKSoftmax` without a capacity: logits [T, E] float32."""
        num_rows, num_experts = logits.shape
        expert_ids = torch.empty(num_rows, inputs.max_top_k, dtype=torch.int32)
        weights = torch.empty(num_rows, inputs.max_top_k)
        steering = Steering(
            slots=inputs.slots.data_ptr(),
            top_k=inputs.top_k.data_ptr(),
            min_p=inputs.min_p.data_ptr(),
            forbidden=inputs.forbidden.data_ptr(),
            num_layers=inputs.forbidden.shape[1],
            max_top_k=inputs.max_top_k,
        )
        self._library.route(
            logits.data_ptr(),
            num_rows,
            num_experts,
            layer,
            renormalize,
            byref(steering),
            expert_ids.data_ptr(),
            weights.data_ptr(),
        )
        routing = Routing(expert_ids, weights, logits, expert_ids)
        if record is not None:
            record.write(layer, routing)
        return routing

    def moe_block(self, layer: int, normed: Tensor, routing: Routing, x: Tensor) -> None:
        """Add to x [T, D], in place, sum_k weight_k * W2_k(silu(W1_k row) * W3_k row) for the rows of `normed`."""
        expert_ids, weights = routing.expert_ids.contiguous(), routing.weights.contiguous()
        self._library.moe_block(
            byref(self._shape),
            byref(self._weights_of(layer)),
            *expert_ids.shape,
            normed.data_ptr(),
            expert_ids.data_ptr(),
            weights.data_ptr(),
            x.data_ptr(),
            self._workspace,
        )

    def _allocate(self, name: str) -> PackedParam:
        shape = self._specs[name].shape
        interleaved = name.endswith(".w13")
        num_matrices = shape[0] if len(shape) == 3 else 1
        num_rows, size = shape[-2:]
        if name.endswith(".qkv"):
            num_rows = num_rows // self._config.head_dim * self._head_stride
        blocks = num_matrices * _num_blocks(num_rows, interleaved=interleaved)
        match self._weight_type:
            case WeightType.bfloat16:
                data = host_zeros((blocks, -(-size // 2), _LANES, 2), torch.bfloat16)
            case WeightType.int8:
                data = host_zeros((blocks, -(-size // 4), _LANES, 4), torch.int8)
            case WeightType.float32:
                data = host_zeros((blocks, size, _LANES), torch.float32)
        scales = torch.zeros(blocks * _LANES) if self._weight_type is WeightType.int8 else None
        return PackedParam(data, scales, num_rows, size, interleaved)

    def _weights_of(self, layer: int) -> LayerWeights:
        if layer not in self._layers:
            name = f"layers.{layer}"
            matrices = {"qkv": "qkv", "out": "o", "w13": "w13", "w2": "w2"}
            packed = {field: self._packed[f"{name}.{param}"] for field, param in matrices.items()}
            self._layers[layer] = LayerWeights(
                input_norm=self._plain[f"{name}.input_norm"].data_ptr(),
                post_norm=self._plain[f"{name}.post_attention_norm"].data_ptr(),
                gate=self._plain[f"{name}.gate"].data_ptr(),
                **{field: param.data.data_ptr() for field, param in packed.items()},
                **{f"{field}_scale": _address(param.scales) for field, param in packed.items()},
            )
        return self._layers[layer]

    def _step_of(self, batch: Batch, block_size: int) -> Step:
        """What is the same for all layers of a step, made for the first and kept to the last."""
        if self._step is None or self._step[0] is not batch:
            angles = batch.positions.float().unsqueeze(-1) * self._inv_freq
            cos, sin = angles.cos(), angles.sin()
            step = Step(
                num_tokens=batch.num_tokens,
                num_seqs=batch.seq_lens.shape[0],
                table_width=batch.block_tables.shape[1],
                block_size=block_size,
                slot_mapping=batch.slot_mapping.data_ptr(),
                cu_seqlens=batch.cu_seqlens.data_ptr(),
                seq_lens=batch.seq_lens.data_ptr(),
                block_tables=batch.block_tables.data_ptr(),
                cos=cos.data_ptr(),
                sin=sin.data_ptr(),
            )
            self._step = batch, step, (cos, sin)
        return self._step[1]


def _num_blocks(num_rows: int, *, interleaved: bool) -> int:
    parts = 2 if interleaved else 1
    return parts * -(-(num_rows // parts) // _LANES)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
