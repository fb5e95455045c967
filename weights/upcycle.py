"""Sparse upcycling: a dense checkpoint's feed-forward blocks become the experts of a Mixtral checkpoint.

Komatsuzaki et al. 2022, arXiv 2212.05055, section 3: every expert starts as a copy of the dense block. Mixtral's top-K
weights sum to 1, so equal experts compute exactly what the dense block computes, whichever of them a router chooses.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights.checkpoint import Checkpoint, TensorInfo
from weights.config import ModelConfig, hf_config
from weights.errors import CheckpointError
from weights.files import find_file, has_file, new_folder
from weights.fp8 import dequantize
from weights.gguf_tokenizer import write_tokenizer
from weights.loader import load, match
from weights.params import Piece
from weights.seeds import named_generator
from weights.writer import ShardWriter

MAX_SHARD_BYTES = 480_000_000
NUM_DIRECTIONS = 8

_EXPERT_NAMES = {"mlp.gate_proj.weight": "w1", "mlp.up_proj.weight": "w3", "mlp.down_proj.weight": "w2"}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)


def calibration_text() -> str:
    """About 2,000 tokens of varied text: prose, code, lists, tables, several languages."""
    return resources.files("weights").joinpath("calibration.txt").read_text(encoding="utf-8")


def router_rows(mean: Tensor, covariance: Tensor, num_experts: int, *, seed: int) -> Tensor:
    """The gate [E, D], float32, of one layer that spreads its tokens evenly over untrained experts.

    `mean` [D] and `covariance` [D, D] are those of the layer's inputs x. The rows are Gaussian, made orthogonal to the
    mean and to the top eight principal directions of the centred covariance: what all tokens share, and the few
    directions in which they vary most, would otherwise send most tokens to the same experts. (Fewer directions when D
    is under 32, so that most of the space is left.) Each row w is then scaled so that its logits w @ x have standard
    deviation 1 over those inputs, sqrt(w C w) = 1: no expert is favoured for having larger logits, and the softmax
    over E is neither flat nor saturated.
    """
    hidden_size = mean.shape[0]
    mean, covariance = mean.double(), covariance.double()
    directions = min(NUM_DIRECTIONS, hidden_size // 4)
    principal = torch.linalg.eigh(covariance).eigenvectors[:, hidden_size - directions :]  # [D, 8], ascending order
    basis = torch.linalg.qr(torch.cat([mean[:, None], principal], dim=1)).Q  # [D, 9]
    rows = torch.randn(num_experts, hidden_size, generator=named_generator(seed, "router"), dtype=torch.float64)
    rows -= rows @ basis @ basis.T
    variance = ((rows @ covariance) * rows).sum(1, keepdim=True)  # [E, 1]
    scale = torch.where(variance > 0, variance, rows.square().sum(1, keepdim=True)).sqrt()
    return (rows / scale).float()


def write_mixtral(
    dense: Checkpoint,
    out: Path,
    *,
    routers: Sequence[Tensor],
    num_experts: int = 8,
    noise: float = 0.0,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    progress: bool = False,
) -> None:
    """Writes a Mixtral checkpoint to the folder `out`: config, safetensors shards with their index, tokenizer.

    `routers` has the gate [E, D] of each layer. With `noise` S, every expert tensor gets Gaussian noise of S times its
    standard deviation, drawn from the seed and the tensor's own name. The folder appears when it is complete. Memory
    stays at a few tensors. Raises CheckpointError when `dense` cannot be read, or `out` is there and not empty or
    cannot be written.
    """
    source = dense.config
    assert source.model_type != "mixtral"
    assert [tuple(router.shape) for router in routers] == [(num_experts, source.hidden_size)] * source.num_layers
    config = replace(
        source,
        model_type="mixtral",
        num_experts=num_experts,
        num_experts_per_tok=min(2, num_experts),
        dtype=str(dtype).removeprefix("torch."),
        fp8=False,
        fp8_experts=False,
    )
    gates = {f"model.layers.{i}.block_sparse_moe.gate.weight": router for i, router in enumerate(routers)}
    planned = [(name, tuple(gate.shape)) for name, gate in gates.items()]
    pieces = match(dense)
    for name in dense.tensors:
        if name in pieces:
            planned += [(target, pieces[name].shape) for target in _targets(name, num_experts)]
    infos = {name: TensorInfo(shape, dtype, _numel(shape) * dtype.itemsize) for name, shape in planned}
    try:
        with new_folder(out) as folder:
            with ShardWriter(folder, infos, max_shard_bytes=MAX_SHARD_BYTES) as writer:
                for name, gate in gates.items():
                    writer.add(name, gate.to(dtype))
                load(dense, _ExpertWriter(writer, num_experts, noise, seed, dtype), progress=progress)
            _write_tokenizer(dense.path, folder)
            _write_configs(config, folder)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error.strerror}") from None


class _ExpertWriter:
    """A sink that writes each dense tensor once, or E times where it is part of a feed-forward block."""

    def __init__(self, writer: ShardWriter, num_experts: int, noise: float, seed: int, dtype: torch.dtype) -> None:
        self._writer = writer
        self._num_experts = num_experts
        self._noise = noise
        self._seed = seed
        self._dtype = dtype

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        values = tensor.float() if scale is None else dequantize(tensor, scale)
        deviation = self._noise * values.std() if piece.expert is not None and self._noise else None
        for target in _targets(piece.source, self._num_experts):
            if deviation is None:
                self._writer.add(target, values.to(self._dtype))
            else:
                noise = torch.randn(values.shape, generator=named_generator(self._seed, target))
                self._writer.add(target, (values + deviation * noise).to(self._dtype))


def _targets(name: str, num_experts: int) -> list[str]:
    """The Mixtral tensors that a dense tensor becomes.

    Example: "model.layers.0.mlp.up_proj.weight" becomes "model.layers.0.block_sparse_moe.experts.{e}.w3.weight".
    """
    for suffix, weight in _EXPERT_NAMES.items():
        if name.endswith(suffix):
            layer = f"{name.removesuffix(suffix)}block_sparse_moe.experts"
            return [f"{layer}.{e}.{weight}.weight" for e in range(num_experts)]
    return [name]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


def _write_configs(config: ModelConfig, folder: Path) -> None:
    mapping = hf_config(config)
    _write_json(folder / "generation_config.json", {key: mapping[key] for key in ("bos_token_id", "eos_token_id")})
    _write_json(folder / "config.json", mapping)


def _write_tokenizer(dense: Path, folder: Path) -> None:
    """The tokenizer inside a GGUF file, or the tokenizer files of a folder."""
    if dense.is_file():
        write_tokenizer(dense, folder)
        return
    for name in _TOKENIZER_FILES:
        if has_file(dense, name):
            shutil.copyfile(find_file(dense, name), folder / name)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
