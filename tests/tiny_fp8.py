"""Tiny checkpoints of float8 e4m3, laid out as llm-compressor and AutoFP8 lay theirs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import TINY_MIXTRAL, tiny_tensors
from weights.config import ModelConfig, hf_config

# As llm-compressor 0.4 writes it for Mixtral (FP8_DYNAMIC; the scheme FP8 has strategy "tensor" and static inputs).
COMPRESSED_TENSORS: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "input_activations": {
                "actorder": None,
                "block_structure": None,
                "dynamic": True,
                "group_size": None,
                "num_bits": 8,
                "observer": None,
                "observer_kwargs": {},
                "strategy": "token",
                "symmetric": True,
                "type": "float",
            },
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": None,
                "num_bits": 8,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "channel",
                "symmetric": True,
                "type": "float",
            },
        }
    },
    "format": "float-quantized",
    "global_compression_ratio": 1.4628,
    "ignore": ["lm_head", "re:.*block_sparse_moe.gate"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
AUTOFP8: dict[str, Any] = {
    "activation_scheme": "static",
    "ignored_layers": ["lm_head", "model.layers.0.block_sparse_moe.gate"],
    "quant_method": "fp8",
}


def write_tiny_fp8(
    folder: Path,
    config: ModelConfig = TINY_MIXTRAL,
    *,
    layout: dict[str, Any] = COMPRESSED_TENSORS,
    per_channel: bool = True,
    scale_dtype: torch.dtype = torch.bfloat16,
    ignore: tuple[str, ...] = (),
    shards: int = 1,
) -> dict[str, Tensor]:
    """Writes `config`'s tiny tensors, those of attention and of experts in float8, and returns what was written.

    Names that contain a part in `ignore` keep the config's dtype. Scales of AutoFP8 have shape [], of llm-compressor
    [1], per channel [rows, 1].
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in tiny_tensors(config).items():
        if ("self_attn" in name or "experts" in name or "mlp" in name) and not any(part in name for part in ignore):
            tensors[name], scale = quantized(tensor, per_channel, scale_dtype)
            tensors[f"{name}_scale"] = scale.reshape(()) if layout is AUTOFP8 else scale
        else:
            tensors[name] = tensor.clone()
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config, layout)
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
        # Names dealt out in turn: a weight and its scale are in different files.
        home = {name: files[i % shards] for i, name in enumerate(names)}
        for file in files:
            save_file({name: tensors[name] for name in names if home[name] == file}, folder / file)
        index = {"metadata": {}, "weight_map": home}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return tensors


def write_config(folder: Path, config: ModelConfig, layout: dict[str, Any]) -> None:
    mapping = hf_config(config) | {"quantization_config": layout}
    (folder / "config.json").write_text(json.dumps(mapping), encoding="utf-8")


def quantized(tensor: Tensor, per_channel: bool, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """tensor [rows, in] in float8, and its scale [rows, 1] or [1]: the largest magnitude becomes about 448."""
    largest = tensor.float().abs().amax(dim=1, keepdim=True) if per_channel else tensor.float().abs().amax().view(1)
    scale = (largest / 448).to(scale_dtype)
    return (tensor.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the definition, element by element in float64 and rounded once to float32: no scales are left."""
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            result[name] = (tensor.double() * tensors[f"{name}_scale"].double()).float()
        elif not name.endswith("_scale"):
            result[name] = tensor
    return result
