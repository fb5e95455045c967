from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from tests.tiny import TINY_MIXTRAL
from tests.tiny_fp8 import AUTOFP8, COMPRESSED_TENSORS
from weights.config import hf_config, parse_config
from weights.errors import ConfigError
from weights.fp8_config import has_fp8

NESTED: dict[str, Any] = {"a": [1, {"b": None}]}


def layout(group: object = None, *, weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """llm-compressor's quantization_config with its group, the group's weights or keys beside it changed."""
    result = copy.deepcopy(COMPRESSED_TENSORS)
    result["config_groups"]["group_0"]["weights"] |= weights or {}
    if group is not None:
        result["config_groups"]["group_0"] = group
    return result | changes


@pytest.mark.parametrize(
    "config",
    [
        COMPRESSED_TENSORS,
        AUTOFP8,
        layout(weights={"strategy": "tensor"}),
        layout(format="naive-quantized"),
        layout(quantization_status="frozen"),
        layout(kv_cache_scheme={"num_bits": 8, "type": "float", "strategy": "tensor"}),
        layout(sparsity_config={}, transform_config={}, moe_sparsity_config=None, version="0.10.2"),
        layout(
            {**COMPRESSED_TENSORS["config_groups"]["group_0"], "format": "float-quantized"}, format="mixed-precision"
        ),
        layout(sparsity_config={"format": "dense", "ignore": [], "targets": [], "sparsity_structure": "unstructured"}),
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": None},
    ],
    ids=str,
)
def test_what_is_read(config: dict[str, Any]) -> None:
    mapping = hf_config(TINY_MIXTRAL) | {"quantization_config": config}
    parsed = parse_config(json.loads(json.dumps(mapping)))
    assert parsed.fp8
    assert parsed.fp8_experts
    assert parsed.dtype == TINY_MIXTRAL.dtype


def test_nothing_said_of_weights_is_no_quantisation() -> None:
    kv_only = layout({"targets": ["LlamaAttention"], "weights": None, "input_activations": {"num_bits": 8}})
    assert not has_fp8({})
    assert not has_fp8({"quantization_config": None})
    assert not has_fp8({"quantization_config": kv_only})
    assert not parse_config(hf_config(TINY_MIXTRAL)).fp8


def test_the_name_of_the_first_releases() -> None:
    assert has_fp8({"compression_config": COMPRESSED_TENSORS})
    with pytest.raises(ConfigError, match=r"^compression_config: group 'group_0' has weights of 4 bits"):
        has_fp8({"compression_config": layout(weights={"num_bits": 4})})


GROUP = "^quantization_config: group 'group_0' "


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "awq", "bits": 4},
            "^quantization_config: quant_method 'awq' is not supported; known: compres",
        ),
        ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"load_in_8bit": True}, "quant_method None"),
        ({"quant_method": NESTED}, "quant_method"),
        ("fp8", "^quantization_config must be an object or null, not 'fp8'"),
        (
            layout(weights={"num_bits": 4, "type": "int", "strategy": "group"}),
            GROUP + "has weights of 4 bits, type 'int'",
        ),
        (layout(weights={"type": "int"}), GROUP + "has weights of 8 bits, type 'int'; supported: 8 bits"),
        (layout(weights={"num_bits": 4}), GROUP + "has weights of 4 bits, type 'float'"),
        (layout(weights={"num_bits": True}), GROUP + "has weights of True bits"),
        (
            layout(weights={"strategy": "group", "group_size": 128}),
            GROUP + "has weights of strategy 'group'; supported",
        ),
        (layout(weights={"strategy": "block", "block_structure": [128, 128]}), "strategy 'block'"),
        (layout(weights={"strategy": None}), "strategy None"),
        (layout(weights={"symmetric": False}), GROUP + "has asymmetric weights"),
        (layout(weights={"dynamic": True}), GROUP + "has weights whose scales are dynamic"),
        (layout(format="pack-quantized"), GROUP + "has format 'pack-quantized'; supported: float-quantized, naive-"),
        (layout(format="mixed-precision"), GROUP + "has format 'mixed-precision'"),
        (layout(format=None), GROUP + "has format None"),
        (layout(["Linear"]), GROUP + "must be an object whose weights are"),
        (layout({"weights": 8}), GROUP + "must be an object whose weights are"),
        (layout(config_groups={}), "config_groups must be an object with at least one group"),
        (layout(config_groups=None), "config_groups must be"),
        (layout(config_groups=[1]), "config_groups must be"),
        (layout(sparsity_config={"format": "sparse-24-bitmask"}), "^quantization_config: sparsity_config is not supp"),
        (layout(sparsity_config={"sparsity_structure": "2:4"}), "sparsity_config is not supported"),
        (layout(sparsity_config="dense"), "sparsity_config is not supported"),
        (layout(transform_config={"config_groups": {"u": {}}}), "^quantization_config: transform_config is not supp"),
        (AUTOFP8 | {"weight_block_size": [128, 128]}, r"a scale for each block of \[128, 128\] are not supported"),
        (AUTOFP8 | {"fmt": "e5m2"}, "format 'e5m2' are not supported"),
    ],
    ids=str,
)
def test_other_schemes_are_named_in_one_line(config: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(hf_config(TINY_MIXTRAL) | {"quantization_config": config})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_one_group_of_another_kind_is_enough_to_refuse() -> None:
    group = copy.deepcopy(COMPRESSED_TENSORS["config_groups"]["group_0"])
    group["weights"]["num_bits"] = 4
    config = layout(config_groups=COMPRESSED_TENSORS["config_groups"] | {"group_1": group})
    with pytest.raises(ConfigError, match="group 'group_1' has weights of 4 bits"):
        has_fp8({"quantization_config": config})
