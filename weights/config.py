"""config.json -> ModelConfig, by a schema of our own: unknown keys are ignored, nothing of a checkpoint is executed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights.errors import CheckpointError, ConfigError, show
from weights.files import find_file, has_file, read_json_object
from weights.fp8_config import has_fp8

MAX_CONFIG_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of one mixture-of-experts decoder.

    Sizes are counts (not bytes); `rope_theta` is the rotary base; `sliding_window` is in tokens, None: full attention.
    `num_experts` = E, `num_experts_per_tok` = K, `hidden_size` = D, `intermediate_size` = F, `vocab_size` = V.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    num_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    """The dtype the checkpoint says it holds: float32, float16 or bfloat16."""
    router_type: str = "topk_softmax"
    """One of ROUTER_TYPES."""
    capacity_factor: float | None = None
    """An expert takes ceil(capacity_factor * K * T / E) of a batch's assignments; None: all of them."""
    norm_topk_prob: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    fp8: bool = False
    """Whether linear weights may be float8 e4m3 with scales (weights/fp8.py)."""
    fp8_experts: bool = False
    """Whether all weights of the experts are: taken for granted until a checkpoint's headers are read."""

    def is_sparse(self, layer: int) -> bool:
        """Whether `layer` routes to experts. Every Mixtral layer does."""
        return self.num_experts > 0 and 0 <= layer < self.num_layers


ROUTER_TYPES = ("topk_softmax", "switch", "gshard", "noisy_topk")

_ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
_DTYPES = ("float32", "float16", "bfloat16")

# What a family means by a key that its config.json leaves out. Sizes have no default: without them it is broken.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mixtral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": 4096},
    "llama": {"num_key_value_heads": None, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "sliding_window": None},
}

# Far above any model there is, far below what would hang or exhaust a machine that only counts parameters.
_LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 12,
    "max_position_embeddings": 1 << 31,
    "sliding_window": 1 << 31,
    "num_local_experts": 1 << 10,
    "num_experts_per_tok": 1 << 10,
}


def load_config(folder: Path) -> ModelConfig:
    """The configuration in `folder`: its config.json, with the end-of-sequence ids of generation_config.json added.

    Raises ConfigError, whose message names the file and the field, when there is none or it cannot be used.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    try:
        mapping = read_json_object(find_file(folder, "config.json"), max_bytes=MAX_CONFIG_BYTES)
        generation: Mapping[str, Any] = {}
        if has_file(folder, "generation_config.json"):
            generation = read_json_object(find_file(folder, "generation_config.json"), max_bytes=MAX_CONFIG_BYTES)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    try:
        return parse_config(mapping, generation)
    except ConfigError as error:
        raise ConfigError(f"{folder / 'config.json'}: {error}") from None


def parse_config(mapping: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
    """The ModelConfig that a config.json's `mapping` (and a generation_config.json's `generation`) describes.

    Both spellings are read: `rope_theta` and `torch_dtype`, or `rope_parameters` and `dtype`. A dense Llama or Mistral
    becomes a mixture of one expert. Raises ConfigError naming the field for a value of the wrong kind or size, and for
    a feature that would change the model's output and is not supported (`auto_map` and unknown keys are ignored).
    """
    fields = _Fields(mapping)
    model_type = mapping.get("model_type")
    if not isinstance(model_type, str) or model_type not in _ARCHITECTURES:
        known = ", ".join(sorted(_ARCHITECTURES))
        raise ConfigError(f"model_type {show(model_type)} is not supported; known: {known}")
    defaults = _DEFAULTS[model_type]
    _refuse_unsupported(mapping)

    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    num_kv_heads = fields.optional_size("num_key_value_heads", defaults) or num_heads
    head_dim = fields.optional_size("head_dim", {"head_dim": None})
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_attention_heads {num_heads} must be a multiple of num_key_value_heads {num_kv_heads}")
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(f"hidden_size {hidden_size} must be a multiple of num_attention_heads {num_heads}")
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise ConfigError(f"head_dim {head_dim} must be even: rotary embedding turns pairs")

    num_experts = num_experts_per_tok = 1
    if model_type == "mixtral":
        num_experts = fields.size("num_local_experts")
        num_experts_per_tok = fields.size("num_experts_per_tok")
        if num_experts_per_tok > num_experts:
            raise ConfigError(
                f"num_experts_per_tok {num_experts_per_tok} must be at most num_local_experts {num_experts}"
            )
    vocab_size = fields.size("vocab_size")
    bos = _token_ids(mapping, "bos_token_id", vocab_size)
    eos = _token_ids(mapping, "eos_token_id", vocab_size) + _token_ids(generation or {}, "eos_token_id", vocab_size)
    fp8 = has_fp8(mapping)
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=fields.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.size("max_position_embeddings"),
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        rms_norm_eps=fields.positive("rms_norm_eps", defaults["rms_norm_eps"]),
        rope_theta=_rope_theta(mapping, defaults["rope_theta"]),
        sliding_window=fields.optional_size("sliding_window", defaults),
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(mapping),
        router_type=_router_type(mapping),
        capacity_factor=_capacity_factor(mapping),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=tuple(dict.fromkeys(eos)),
        fp8=fp8,
        fp8_experts=fp8,
    )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of `config`: `parse_config(hf_config(c)) == c`, and transformers reads it (versions 4 and 5).

    Not for weights of float8, which this project reads but does not write.
    """
    assert not config.fp8
    eos = config.eos_token_ids
    result: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": config.dtype,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
    }
    if config.model_type == "mixtral":
        result |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    # Ours, and only where they say more than the model type does.
    if config.router_type != "topk_softmax":
        result["router_type"] = config.router_type
    if config.capacity_factor is not None:
        result["capacity_factor"] = config.capacity_factor
    return result


class _Fields:
    """Typed reads from a mapping that nobody vouches for; every error names the field."""

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        self._mapping = mapping

    def size(self, name: str) -> int:
        if name not in self._mapping:
            raise ConfigError(f"{name} is missing")
        value, largest = self._mapping[name], _LARGEST[name]
        if not _is_int(value) or not 1 <= value <= largest:
            raise ConfigError(f"{name} must be an integer from 1 to {largest}, not {show(value)}")
        return int(value)

    def optional_size(self, name: str, defaults: Mapping[str, Any]) -> int | None:
        """A size that may be null; a missing one takes the family's default."""
        if self._mapping.get(name, defaults[name]) is None:
            return None
        return self.size(name) if name in self._mapping else int(defaults[name])

    def positive(self, name: str, default: float) -> float:
        return _positive(name, self._mapping.get(name, default))

    def flag(self, name: str) -> bool:
        value = self._mapping.get(name, False)
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {show(value)}")
        return value


def _refuse_unsupported(mapping: Mapping[str, Any]) -> None:
    """Features that change what a model computes: refused by name rather than silently left out."""
    supported = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
        "layer_types": None,
    }
    for name, only in supported.items():
        value = mapping.get(name)
        if value is not None and value != only:
            raise ConfigError(f"{name} {show(value)} is not supported; only {show(only)} is")


def _rope_theta(mapping: Mapping[str, Any], default: float) -> float:
    """The rotary base, from `rope_theta` or `rope_parameters.rope_theta`. Any kind of scaling is refused."""
    found = {"rope_theta": mapping["rope_theta"]} if mapping.get("rope_theta") is not None else {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = mapping.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{name} must be an object or null, not {show(rope)}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or not rope.keys() <= {"rope_type", "type", "rope_theta"}:
            raise ConfigError(f"{name} {show(dict(rope))} is not supported; only rope_type 'default' is")
        if "rope_theta" in rope:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    values = {_positive(name, value) for name, value in found.items()}
    if len(values) > 1:
        raise ConfigError(f"{' and '.join(found)} differ: {' and '.join(map(str, sorted(values)))}")
    return values.pop() if values else default


def _dtype(mapping: Mapping[str, Any]) -> str:
    given = {name: mapping[name] for name in ("dtype", "torch_dtype") if mapping.get(name) is not None}
    for name, value in given.items():
        if value not in _DTYPES:
            raise ConfigError(f"{name} must be one of {', '.join(_DTYPES)}, not {show(value)}")
    if len(set(given.values())) > 1:
        raise ConfigError(f"dtype {given['dtype']} and torch_dtype {given['torch_dtype']} differ")
    return str(next(iter(given.values()), "bfloat16"))


def _router_type(mapping: Mapping[str, Any]) -> str:
    value = mapping.get("router_type")
    if value is None:
        return ROUTER_TYPES[0]
    if not isinstance(value, str) or value not in ROUTER_TYPES:
        raise ConfigError(f"router_type {show(value)} is not supported; known: {', '.join(ROUTER_TYPES)}")
    return value


def _capacity_factor(mapping: Mapping[str, Any]) -> float | None:
    value = mapping.get("capacity_factor")
    return None if value is None else _positive("capacity_factor", value)


def _token_ids(mapping: Mapping[str, Any], name: str, vocab_size: int) -> tuple[int, ...]:
    """A token id, a list of them, or null."""
    value = mapping.get(name)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    for token_id in ids:
        if not _is_int(token_id) or not 0 <= token_id < vocab_size:
            raise ConfigError(f"{name} must be below vocab_size {vocab_size} and not negative, not {show(token_id)}")
    return tuple(ids)


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a positive number, not {show(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ConfigError(f"{name} must be a positive number, not {show(value)}") from None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
