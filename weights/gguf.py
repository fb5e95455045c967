"""GGUF files of the llama architecture, dense or with experts, presented as Hugging Face checkpoints."""

from __future__ import annotations

import re
from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weights.checkpoint import TensorInfo
from weights.config import ModelConfig, parse_config
from weights.errors import CheckpointError, ConfigError
from weights.gguf_metadata import metadata, open_gguf
from weights.staging import Staging

if TYPE_CHECKING:
    from gguf import GGUFReader

# GGUF name -> Hugging Face name; {i} is the layer.
_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
    "ffn_gate_inp.weight": "block_sparse_moe.gate.weight",
}
_EXPERT_NAMES = {"ffn_gate": "w1", "ffn_up": "w3", "ffn_down": "w2"}
_FILE_DTYPES = {0: "float32", 1: "float16"}  # general.file_type; every other type is quantised, or bfloat16


@dataclass(frozen=True, slots=True)
class _Source:
    """Where a tensor's values are: a GGUF tensor, or one expert's slice of it; q and k rows have to be put in order."""

    data: np.ndarray[Any, Any]
    quantization: Any
    num_rotary_heads: int | None


class GgufCheckpoint:
    """A .gguf file whose `general.architecture` is llama. Every tensor is dequantised to float32 as it is read.

    The configuration's model_type is mixtral when the metadata counts experts, else llama. Raises CheckpointError or
    ConfigError when the file is malformed or holds something else.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        reader = open_gguf(path)
        self._config = _config(path, reader)
        heads = {"q_proj": self._config.num_heads, "k_proj": self._config.num_kv_heads}
        self._sources: dict[str, _Source] = {}
        for tensor in reader.tensors:
            parts = list(tensor.data) if tensor.data.ndim == 3 else [tensor.data]
            for name, data in zip(hf_names(tensor.name, len(parts)), parts, strict=False):
                if name in self._sources:
                    raise CheckpointError(f"{path}: tensor {name!r} is there twice")
                projection = name.split(".")[-2] if name.count(".") > 1 else ""
                self._sources[name] = _Source(data, tensor.tensor_type, heads.get(projection))
        self._tensors = {name: _info(source) for name, source in self._sources.items()}

    @property
    def path(self) -> Path:
        return self._path

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(
        self, names: Collection[str] | None = None, *, staging: Staging | None = None
    ) -> Generator[tuple[str, Tensor], None, None]:
        """Every tensor has memory of its own."""
        from gguf.quants import dequantize

        del staging  # what dequantising returns is pageable, so that a copy has left it when it returns
        for name, source in self._sources.items():
            if names is not None and name not in names:
                continue
            kind = source.quantization
            try:
                values = dequantize(source.data, kind)
            except (NotImplementedError, ValueError) as error:
                raise CheckpointError(f"{self._path}: cannot dequantise {name!r} ({kind.name}): {error}") from None
            tensor = torch.from_numpy(np.require(values, dtype=np.float32, requirements="W"))
            if source.num_rotary_heads is not None:
                tensor = rotary_halves(tensor, source.num_rotary_heads)
            yield name, tensor


def hf_names(name: str, num_experts: int) -> list[str]:
    """The Hugging Face names of what a GGUF tensor holds: one, or one for each expert of a stack.

    Example: "blk.3.ffn_up_exps.weight" of two experts holds "model.layers.3.block_sparse_moe.experts.0.w3.weight" and
    the same of expert 1. A name that is not known stays as it is.
    """
    if name in _GLOBAL_NAMES:
        return [_GLOBAL_NAMES[name]]
    if not (match := re.fullmatch(r"blk\.(\d+)\.(.+)", name)):
        return [name]
    layer, rest = f"model.layers.{match[1]}", match[2]
    if rest in _LAYER_NAMES:
        return [f"{layer}.{_LAYER_NAMES[rest]}"]
    if stacked := re.fullmatch(r"(ffn_gate|ffn_up|ffn_down)_exps\.weight", rest):
        experts, weight = [str(e) for e in range(num_experts)], _EXPERT_NAMES[stacked[1]]
    elif single := re.fullmatch(r"(ffn_gate|ffn_up|ffn_down)\.(\d+)\.weight", rest):
        experts, weight = [single[2]], _EXPERT_NAMES[single[1]]
    else:
        return [name]
    return [f"{layer}.block_sparse_moe.experts.{expert}.{weight}.weight" for expert in experts]


def rotary_halves(values: Tensor, num_heads: int) -> Tensor:
    """Rows of a q or k projection, from the interleaved rotary order of GGUF to the two halves of Hugging Face.

    Example: one head of 4 rows is stored as [r0, r2, r1, r3] (pairs side by side) and becomes [r0, r1, r2, r3], where
    rotary turns row j with row j + 2. `values` is [heads * head_dim, D], the result has the same shape.
    """
    rows, hidden = values.shape
    if rows % (2 * num_heads):
        raise CheckpointError(f"a q or k projection of {rows} rows does not divide into {num_heads} heads of even size")
    # [heads, head_dim/2, 2, D] -> [heads, 2, head_dim/2, D]
    return values.view(num_heads, rows // num_heads // 2, 2, hidden).transpose(1, 2).reshape(rows, hidden)


def _config(path: Path, reader: GGUFReader) -> ModelConfig:
    """The ModelConfig, by way of the config.json that the metadata amounts to."""
    values = metadata(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"{path}: GGUF architecture {architecture!r} is not supported; known: llama")
    if values.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in tensors:
        raise ConfigError(f"{path}: rope scaling is not supported")
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{path}: tensor 'token_embd.weight' is missing")
    num_experts = values.get("llama.expert_count")
    end_ids = [values.get("tokenizer.ggml.eos_token_id"), values.get("tokenizer.ggml.eot_token_id")]
    mapping = {
        "model_type": "mixtral" if num_experts else "llama",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "hidden_size": values.get("llama.embedding_length"),
        "intermediate_size": values.get("llama.feed_forward_length"),
        "num_hidden_layers": values.get("llama.block_count"),
        "num_attention_heads": values.get("llama.attention.head_count"),
        "num_key_value_heads": values.get("llama.attention.head_count_kv"),
        "head_dim": values.get("llama.attention.key_length", values.get("llama.rope.dimension_count")),
        "max_position_embeddings": values.get("llama.context_length"),
        "num_local_experts": num_experts,
        "num_experts_per_tok": values.get("llama.expert_used_count"),
        "rms_norm_eps": _shortest(values.get("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(values.get("llama.rope.freq_base", 10000.0)),
        "sliding_window": values.get("llama.attention.sliding_window"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "dtype": _FILE_DTYPES.get(values.get("general.file_type", -1), "bfloat16"),
        "bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": [token_id for token_id in end_ids if token_id is not None],
    }
    try:
        return parse_config({key: value for key, value in mapping.items() if value is not None})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _shortest(value: object) -> object:
    """A float32 of the metadata as the decimal number it was: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _info(source: _Source) -> TensorInfo:
    """The shape after dequantising, from the shape in bytes of the rows."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_from_byte_shape

    assert source.quantization in GGML_QUANT_SIZES
    shape: tuple[int, ...] = source.data.shape
    if source.data.dtype == np.uint8 and source.quantization != GGMLQuantizationType.I8:
        shape = quant_shape_from_byte_shape(shape, source.quantization)
    numel = int(np.prod(shape, dtype=np.int64))
    return TensorInfo(tuple(int(size) for size in shape), torch.float32, 4 * numel)
