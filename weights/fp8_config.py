"""quantization_config of a config.json: which checkpoints of 8 bits are read as they are, and why others are not.

Read is what comes down to `tensor * scale` with one scale for each row or each tensor, in float8 e4m3: the FP8 schemes
of llm-compressor (quant_method "compressed-tensors") and AutoFP8's checkpoints (quant_method "fp8"). How activations
or the KV cache were to be quantised does not matter to the weights, and neither does which modules were left out: the
tensors' own dtypes tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weights.errors import ConfigError, show

_KEY = "quantization_config"
_FORMATS = ("float-quantized", "naive-quantized")


def has_fp8(mapping: Mapping[str, Any]) -> bool:
    """Whether a config.json's `mapping` says that linear weights are float8 e4m3 with scales.

    False when it says nothing of quantisation. Raises ConfigError naming the scheme when it is another one.
    """
    key = _KEY if mapping.get(_KEY) is not None else "compression_config"  # the name in llm-compressor's first releases
    config = mapping.get(key)
    if config is None:
        return False
    if not isinstance(config, Mapping):
        raise ConfigError(f"{key} must be an object or null, not {show(config)}")
    method = config.get("quant_method")
    if method == "compressed-tensors":
        return _has_fp8_group(key, config)
    if method == "fp8":
        _check_autofp8(config)
        return True
    raise ConfigError(
        f"{key}: quant_method {show(method)} is not supported; known: compressed-tensors and fp8, with weights of "
        f"float8 e4m3"
    )


def _has_fp8_group(key: str, config: Mapping[str, Any]) -> bool:
    """By the groups of modules, whose weights must all be of the one kind that is read."""
    for name in ("sparsity_config", "transform_config", "moe_sparsity_config"):
        value = config.get(name)
        dense = name != "transform_config" and isinstance(value, Mapping) and value.get("format") == "dense"
        if value and not dense:  # a sparsity whose format is dense leaves everything as it is
            raise ConfigError(f"{key}: {name} is not supported")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ConfigError(f"{key}: config_groups must be an object with at least one group, not {show(groups)}")
    found = False
    for name, group in groups.items():
        where = f"{key}: group {show(name)}"
        weights = group.get("weights") if isinstance(group, Mapping) else group
        if weights is None:
            continue  # about activations or the KV cache alone
        if not isinstance(weights, Mapping):
            raise ConfigError(f"{where} must be an object whose weights are an object or null")
        _check_weights(where, weights)
        file_format = group.get("format") or config.get("format")
        if file_format not in _FORMATS:
            raise ConfigError(f"{where} has format {show(file_format)}; supported: {', '.join(_FORMATS)}")
        found = True
    return found


def _check_weights(where: str, weights: Mapping[str, Any]) -> None:
    num_bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    if (num_bits, kind) != (8, "float"):
        raise ConfigError(
            f"{where} has weights of {show(num_bits)} bits, type {show(kind)}; supported: 8 bits, 'float'"
        )
    strategy = weights.get("strategy")
    if strategy not in ("tensor", "channel"):
        raise ConfigError(f"{where} has weights of strategy {show(strategy)}; supported: 'tensor', 'channel'")
    if weights.get("symmetric", True) is not True:
        raise ConfigError(f"{where} has asymmetric weights; only symmetric ones are supported")
    if weights.get("dynamic", False) is not False:
        raise ConfigError(f"{where} has weights whose scales are dynamic; only stored scales are supported")


def _check_autofp8(config: Mapping[str, Any]) -> None:
    """The same quant_method stands for block-wise scales elsewhere."""
    if config.get("weight_block_size") is not None:
        raise ConfigError(
            f"{_KEY}: fp8 weights with a scale for each block of {show(config['weight_block_size'])} are not "
            f"supported; one for each row or tensor is"
        )
    if config.get("fmt") not in (None, "e4m3"):
        raise ConfigError(f"{_KEY}: fp8 weights of format {show(config['fmt'])} are not supported; 'e4m3' is")
