"""Tiny GGUF files, written with the gguf package from tensors under their Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from weights.config import ModelConfig

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_GLOBAL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_EXPERT_NAMES = {"w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up"}


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    quantization: Callable[[str], gguf.GGMLQuantizationType] = lambda _: gguf.GGMLQuantizationType.F32,
    stacked: bool = True,
    edit: Callable[[gguf.GGUFWriter], object] = lambda _: None,
) -> dict[str, Tensor]:
    """Writes `tensors` as converters of the llama architecture do: q and k rows interleaved, experts stacked or, as in
    old files, one by one. `quantization` chooses the type by Hugging Face name. Returns what a reader must get back.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(0 if config.dtype == "float32" else 3)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    edit(writer)
    expected: dict[str, Tensor] = {}
    stacks: dict[str, list[tuple[Any, gguf.GGMLQuantizationType]]] = {}
    for name, tensor in tensors.items():
        kind = quantization(name)
        values = _interleaved(name, tensor, config).float().contiguous().numpy()
        data = gguf.quants.quantize(values, kind)
        restored = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
        expected[name] = _interleaved(name, restored, config, inverse=True)
        target = gguf_name(name)
        if stacked and "experts" in name:
            stacks.setdefault(f"{target.rpartition('.')[0].removesuffix('.weight')}_exps.weight", []).append(
                (data, kind)
            )
        else:
            writer.add_tensor(f"{target}.weight", data, raw_dtype=kind)
    for target, parts in stacks.items():
        writer.add_tensor(target, np.stack([data for data, _ in parts]), raw_dtype=parts[0][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def gguf_name(name: str) -> str:
    """Without ".weight". Example: model.layers.1.block_sparse_moe.experts.3.w1.weight is blk.1.ffn_gate.3."""
    stem = name.removesuffix(".weight")
    if stem in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[stem]
    layer, rest = stem.removeprefix("model.layers.").split(".", 1)
    if rest.startswith("block_sparse_moe.experts."):
        expert, weight = rest.split(".")[-2:]
        return f"blk.{layer}.{_EXPERT_NAMES[weight]}.{expert}"
    return f"blk.{layer}.{_LAYER_NAMES.get(rest, rest)}"


def _interleaved(name: str, tensor: Tensor, config: ModelConfig, *, inverse: bool = False) -> Tensor:
    """q and k rows in the order of GGUF, written as an index: row 2*j + s of a head comes from row s*hd/2 + j."""
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    projection = name.split(".")[-2]
    if projection not in heads:
        return tensor
    half = config.head_dim // 2
    order = [
        head * config.head_dim + s * half + j for head in range(heads[projection]) for j in range(half) for s in (0, 1)
    ]
    if not inverse:
        return tensor[order]
    result = torch.empty_like(tensor)
    result[order] = tensor
    return result
