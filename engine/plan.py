"""What a model takes in memory, from its configuration alone: no weight is read and nothing is allocated.

The engine plans its own memory with the same functions, so what `mixserve plan` says is what a server then does.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from engine.errors import ConfigurationError
from weights.config import ModelConfig
from weights.families import mixtral
from weights.params import ParamKind

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes an element, by dtype name."""

BATCH_CONTEXT = 4096
"""Tokens a sequence at which `Plan.max_batch` counts sequences."""

NOT_QUANTIZED = frozenset({ParamKind.NORM, ParamKind.ROUTER})
"""Kinds that stay as they are: next to nothing, and what they decide is decided for good."""

EXPERTS_ONLY = frozenset({ParamKind.EXPERT})
"""What is quantised on a GPU, and so by fp8."""

_UNITS = {"": 1, "b": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the memory of one device goes. All sizes are in bytes, all lengths in tokens."""

    dtype: str
    quantization: str | None
    quantized: frozenset[ParamKind]
    """Kinds of 8 bits an element."""
    params: Mapping[ParamKind, int]
    """Number of parameters by kind, as they are held: a tied lm_head is none of its own."""
    active_params: int
    """Parameters that one token's forward pass goes through."""
    kv_bytes_per_token: int
    activation_bytes: int
    memory_bytes: int
    gpu_memory_utilization: float
    max_model_len: int

    @property
    def total_params(self) -> int:
        return sum(self.params.values())

    @property
    def weight_bytes(self) -> int:
        return sum(self.weight_bytes_by_kind.values())

    @property
    def weight_bytes_by_kind(self) -> dict[ParamKind, int]:
        """Scales of quantised weights, a few bytes a row, are left out."""
        return {kind: count * self._itemsize(kind) for kind, count in self.params.items()}

    @property
    def active_bytes(self) -> int:
        """Of the weights that one token's forward pass reads."""
        idle = self.total_params - self.active_params  # all of them in experts
        return self.weight_bytes - idle * self._itemsize(ParamKind.EXPERT)

    def _itemsize(self, kind: ParamKind) -> int:
        return 1 if kind in self.quantized else ITEMSIZE[self.dtype]

    @property
    def budget_bytes(self) -> int:
        """What weights, activations and KV cache may take together."""
        return int(self.memory_bytes * self.gpu_memory_utilization)

    @property
    def max_kv_tokens(self) -> int:
        """Tokens whose keys and values fit beside weights and activations; 0 when not even those fit."""
        left = self.budget_bytes - self.weight_bytes - self.activation_bytes
        return max(0, left // self.kv_bytes_per_token)

    @property
    def required_bytes(self) -> int:
        """What the budget must hold at least: weights, activations and one sequence of `max_model_len` tokens."""
        return self.weight_bytes + self.activation_bytes + self.max_model_len * self.kv_bytes_per_token

    @property
    def fits(self) -> bool:
        return self.required_bytes <= self.budget_bytes

    @property
    def max_batch(self) -> int:
        """Sequences of `BATCH_CONTEXT` tokens that fit at once."""
        return self.max_kv_tokens // BATCH_CONTEXT

    def to_json_dict(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "quantization": self.quantization,
            "total_params": self.total_params,
            "active_params": self.active_params,
            "params": {kind.value: count for kind, count in self.params.items()},
            "weight_bytes": self.weight_bytes,
            "activation_bytes": self.activation_bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "memory_bytes": self.memory_bytes,
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "budget_bytes": self.budget_bytes,
            "required_bytes": self.required_bytes,
            "max_model_len": self.max_model_len,
            "max_kv_tokens": self.max_kv_tokens,
            "max_batch_at_4096": self.max_batch,
            "fits": self.fits,
        }

    def table(self) -> str:
        """The plan for people: parameters by kind, then how they share the memory, then the verdict."""
        sizes = self.weight_bytes_by_kind
        lines = [f"{'':<24}{'parameters':>16}{self.quantization or self.dtype:>14}"]
        lines += [f"{kind.value:<24}{count:>16,}{_gb(sizes[kind]):>14}" for kind, count in self.params.items()]
        lines += [
            f"{'total':<24}{self.total_params:>16,}{_gb(self.weight_bytes):>14}",
            f"{'active for a token':<24}{self.active_params:>16,}{_gb(self.active_bytes):>14}",
            "",
            f"{'memory':<40}{_gb(self.memory_bytes):>14}",
            f"{f'to use ({self.gpu_memory_utilization:.0%})':<40}{_gb(self.budget_bytes):>14}",
            f"{'  weights':<40}{_gb(self.weight_bytes):>14}",
            f"{'  activations':<40}{_gb(self.activation_bytes):>14}",
            f"{'  KV cache':<40}{_gb(self.max_kv_tokens * self.kv_bytes_per_token):>14}",
            f"{'headroom':<40}{_gb(self.memory_bytes - self.budget_bytes):>14}",
            "",
            f"{'KV cache a token':<40}{f'{self.kv_bytes_per_token:,} B':>14}",
            f"{'KV cache holds':<40}{f'{self.max_kv_tokens:,} tok':>14}",
            f"{f'sequences of {BATCH_CONTEXT:,} tokens':<40}{self.max_batch:>14,}",
            "",
            self._verdict(),
        ]
        return "\n".join(lines)

    def _verdict(self) -> str:
        need = f"one sequence of {self.max_model_len:,} tokens needs {_gb(self.required_bytes)}"
        if self.fits:
            return f"Fits: {need} of the {_gb(self.budget_bytes)} to use."
        memory = _gb(self.required_bytes / self.gpu_memory_utilization)
        return f"Does not fit: {need}, there are {_gb(self.budget_bytes)} to use (a memory of {memory} would do)."


def plan_model(
    config: ModelConfig,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    experts_only: bool = False,
    memory_bytes: int | None = None,
    max_model_len: int | None = None,
    max_num_batched_tokens: int = 2048,
    max_num_seqs: int = 256,
    gpu_memory_utilization: float = 0.9,
) -> Plan:
    """Plans `config` on a device of `memory_bytes` (None: this machine's), with the engine's options of the same names.

    `dtype` None: the checkpoint's. `max_model_len` None: the checkpoint's context. `experts_only`: int8 is for the
    experts alone too, as backend cuda has it. Raises ConfigurationError for an
    unknown dtype or a size that cannot be.
    """
    dtype = config.dtype if dtype is None else dtype
    if dtype not in ITEMSIZE:
        raise ConfigurationError(f"dtype {dtype!r} is not known: use {', '.join(ITEMSIZE)}")
    max_model_len = config.max_position_embeddings if max_model_len is None else max_model_len
    memory_bytes = device_memory() if memory_bytes is None else memory_bytes
    sizes = {
        "memory_bytes": memory_bytes,
        "max_model_len": max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_num_seqs": max_num_seqs,
    }
    for name, value in sizes.items():
        if value < 1:
            raise ConfigurationError(f"{name} must be at least 1, not {value}")
    if not 0 < gpu_memory_utilization <= 1:
        raise ConfigurationError(f"gpu_memory_utilization must be in (0, 1], not {gpu_memory_utilization}")
    kinds = EXPERTS_ONLY if experts_only or quantization == "fp8" else frozenset(ParamKind) - NOT_QUANTIZED
    return Plan(
        dtype=dtype,
        quantization=quantization,
        quantized=kinds if quantization is not None else frozenset(),
        params=params_by_kind(config),
        active_params=active_params(config),
        kv_bytes_per_token=kv_bytes_per_token(config, dtype),
        activation_bytes=activation_bytes(
            config,
            dtype,
            max_num_batched_tokens=max_num_batched_tokens,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
        ),
        memory_bytes=memory_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=max_model_len,
    )


def params_by_kind(config: ModelConfig) -> dict[ParamKind, int]:
    """Number of parameters of each kind, in the order of `ParamKind`; kinds without any are left out."""
    counts = dict.fromkeys(ParamKind, 0)
    for spec in mixtral.param_specs(config):
        counts[spec.kind] += math.prod(spec.shape)
    return {kind: count for kind, count in counts.items() if count}


def active_params(config: ModelConfig) -> int:
    """Parameters of one token's forward pass: everything shared, and K of the E experts of each layer.

    The whole embedding counts, as it does in the figures models are known by: 12,879,925,248 for Mixtral 8x7B.
    """
    counts = params_by_kind(config)
    experts = counts.get(ParamKind.EXPERT, 0)
    return sum(counts.values()) - experts + experts * config.num_experts_per_tok // config.num_experts


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes of keys and values that one token leaves in the cache, over all layers.

    Mixtral 8x7B in bfloat16: 2 (K and V) * 32 layers * 8 KV heads * 128 * 2 bytes = 131,072.
    """
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * ITEMSIZE[dtype]


def activation_bytes(
    config: ModelConfig,
    dtype: str,
    *,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    max_model_len: int | None = None,
) -> int:
    """Estimated peak, in bytes, of the intermediate tensors of a step of T = `max_num_batched_tokens` tokens.

    A layer's tensors are freed before the next layer's, so the peak is one of three moments. They are counted in
    elements of the dtype unless a size is given; N is head_dim, G the number of kv heads, C = `max_model_len` (None:
    the checkpoint's context), R = min(T, `max_num_seqs`) the rows that are sampled:

        attention   T * (residual D, norm D, qkv (H+2G)N, rotated and folded 2HN+GN, outputs 2HN)
                    and, for a chunk at the end of the longest sequence, C * 2GN gathered keys and values
                    and min(T, C) * C * H/G places of the mask, once as 1 byte and once in the dtype
        experts     T * (residual D, norm D), and for each of T * K rows grouped by expert the larger of
                    input D, gate and up 2F, silu F, product F    and
                    input D, gate and up 2F, w2 D, ungrouped D, and 3D in float32 while they are summed
        sampling    R * V * 44 bytes: logits as made, adjusted, scaled, filtered, sorted with indices, running sums

    Example, Mixtral 8x7B in bfloat16 with T = 2048 and C = 4096: the experts are the largest moment, with 4096 rows of
    3*4096*2 + 2*14336*2 + 3*4096*4 = 131,072 bytes and 2048 of 2*4096*2, together 570 MB.
    """
    size, tokens, hidden, ffn = ITEMSIZE[dtype], max_num_batched_tokens, config.hidden_size, config.intermediate_size
    context = config.max_position_embeddings if max_model_len is None else max_model_len
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mask = min(tokens, context) * context * config.num_heads // config.num_kv_heads
    attention = (
        tokens * (2 * hidden + 5 * q_width + 3 * kv_width) * size + context * 2 * kv_width * size + mask * (1 + size)
    )
    expert_row = max((hidden + 4 * ffn) * size, (3 * hidden + 2 * ffn) * size + 3 * hidden * 4)
    experts = tokens * (2 * hidden * size + config.num_experts_per_tok * expert_row)
    sampling = min(tokens, max_num_seqs) * config.vocab_size * 44
    return max(attention, experts, sampling)


def parse_memory(text: str) -> int:
    """ "80GiB" -> 85899345920, "141GB" -> 141000000000, "1.5 GiB", "123" (bytes) -> a number of bytes, at least 1.

    Raises ValueError for anything else.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not an amount of memory: write 80GiB, 141GB, 512MiB or a number of bytes")
    whole, _, fraction = match[1].partition(".")
    num_bytes: int = int(whole + fraction) * _UNITS[match[2]] // 10 ** len(fraction)
    if num_bytes < 1:
        raise ValueError(f"{text!r} is no memory at all")
    return num_bytes


def device_memory(device: str = "auto") -> int:
    """Bytes of memory of the first GPU ("cuda", or "auto" where there is one), else `host_memory()`.

    Raises ConfigurationError when "cuda" is asked for and there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device cuda: no GPU is available here; use --device cpu")
    if device != "cpu" and torch.cuda.is_available():
        total: int = torch.cuda.get_device_properties(0).total_memory
        return total
    return host_memory()


def host_memory(root: Path = Path("/")) -> int:
    """Bytes of this machine's memory, or of what the control groups that this process is in leave of it.

    A container or a service manager limits a group, and with it all groups inside. Where they are mounted is told by
    convention (version 2: /sys/fs/cgroup, version 1: its folder "memory"), the way to our own by /proc/self/cgroup:
    "0::/system.slice/mixserve.service" in version 2, "4:memory:/docker/3f2a" in version 1. Inside a container that way
    may be the host's and lead nowhere, but the first folder is the container's then. `root` is where the files are.
    """
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    groups = root / "sys" / "fs" / "cgroup"
    for line in _read_text(root / "proc" / "self" / "cgroup").splitlines():
        controllers, _, group = line.partition(":")[2].partition(":")
        if controllers == "":
            folder, name = groups, "memory.max"
        elif "memory" in controllers.split(","):
            folder, name = groups / "memory", "memory.limit_in_bytes"
        else:
            continue
        path = PurePosixPath(group.lstrip("/"))
        limits = [_read_text(folder / each / name).strip() for each in (path, *path.parents)]
        sizes += [int(limit) for limit in limits if limit.isdecimal()]  # without a limit, version 2 says "max"
    return min(sizes)


def _read_text(path: Path) -> str:
    """What is in the file; nothing when there is none that can be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _gb(num_bytes: float) -> str:
    """ "93.4 GB", "512.0 MB": decimal units, as devices are sold and as checkpoints are measured."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes:.0f} B"
