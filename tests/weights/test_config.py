from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import TINY_LLAMA, TINY_MIXTRAL
from weights.config import MAX_CONFIG_BYTES, ROUTER_TYPES, ModelConfig, hf_config, load_config, parse_config
from weights.errors import ConfigError

MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 32000,
}


def parse(**changes: Any) -> ModelConfig:
    """The configuration of 8x7B with changes; `...` deletes a key."""
    mapping = MIXTRAL_8X7B | changes
    return parse_config({key: value for key, value in mapping.items() if value is not ...})


def test_mixtral_8x7b() -> None:
    assert parse() == ModelConfig(
        model_type="mixtral",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        num_experts=8,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        sliding_window=None,
        tie_word_embeddings=False,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert all(parse().is_sparse(layer) for layer in range(32))
    assert not parse().is_sparse(32)


def test_both_spellings_say_the_same() -> None:
    rope = {"rope_theta": 1000000.0, "rope_type": "default"}
    assert parse(rope_theta=..., rope_parameters=rope, torch_dtype=..., dtype="bfloat16") == parse()
    assert parse(rope_parameters=rope, dtype="bfloat16") == parse()
    assert parse(rope_scaling={"type": "default"}, rope_parameters=None) == parse()
    assert parse(rope_theta=500000).rope_theta == 500000.0


def test_spellings_that_differ_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"rope_theta and rope_parameters\.rope_theta differ"):
        parse(rope_parameters={"rope_theta": 10000.0})
    with pytest.raises(ConfigError, match="dtype float16 and torch_dtype bfloat16 differ"):
        parse(dtype="float16")


def test_what_a_missing_key_means() -> None:
    missing = dict.fromkeys(("rope_theta", "rms_norm_eps", "sliding_window", "torch_dtype", "hidden_act"), ...)
    config = parse(**missing, num_key_value_heads=..., tie_word_embeddings=..., eos_token_id=..., bos_token_id=...)
    assert (config.rope_theta, config.rms_norm_eps, config.sliding_window, config.dtype) == (
        1e6,
        1e-5,
        None,
        "bfloat16",
    )
    assert (config.num_kv_heads, config.tie_word_embeddings) == (8, False)
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)
    mistral = parse(model_type="mistral", **missing)
    assert (mistral.rope_theta, mistral.rms_norm_eps, mistral.sliding_window) == (1e4, 1e-6, 4096)
    llama = parse(model_type="llama", **missing, num_key_value_heads=...)
    assert (llama.rope_theta, llama.num_kv_heads, llama.sliding_window) == (1e4, 32, None)


def test_head_dim_is_explicit_or_implied() -> None:
    assert parse(head_dim=None).head_dim == 128
    assert parse(head_dim=96).head_dim == 96
    assert parse(head_dim=64, hidden_size=4100).head_dim == 64
    assert parse(num_key_value_heads=None).num_kv_heads == 32


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_dense_models_are_mixtures_of_one(model_type: str) -> None:
    config = parse(model_type=model_type, num_local_experts=..., num_experts_per_tok=...)
    assert (config.num_experts, config.num_experts_per_tok) == (1, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
            "sliding_window",
            "num_local_experts",
            "num_experts_per_tok",
        )
        for value in (0, -1, 2**40, 10**4000, True, "32", 32.0, [32])
    ],
)
def test_sizes_are_counts_within_reason(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{field} must be an integer from 1 to") as caught:
        parse(**{field: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen9"}, "model_type 'qwen9' is not supported; known: llama, mistral, mixtral"),
        ({"model_type": ...}, "model_type None is not supported"),
        ({"model_type": ["mixtral"]}, "model_type"),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"num_local_experts": ...}, "num_local_experts is missing"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 must be at most num_local_experts 8"),
        ({"num_attention_heads": 12}, "num_attention_heads 12 must be a multiple of num_key_value_heads 8"),
        ({"num_attention_heads": 24}, "hidden_size 4096 must be a multiple of num_attention_heads 24"),
        ({"head_dim": 33}, "head_dim 33 must be even"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only 'silu' is"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        (
            {"router_type": "hash"},
            "router_type 'hash' is not supported; known: topk_softmax, switch, gshard, noisy_topk",
        ),
        ({"router_type": 1}, "router_type 1 is not supported"),
        ({"router_type": ["switch"]}, "router_type"),
        ({"capacity_factor": 0}, "capacity_factor must be a positive number, not 0"),
        ({"capacity_factor": -1.25}, "capacity_factor"),
        ({"capacity_factor": True}, "capacity_factor"),
        ({"capacity_factor": "1.25"}, "capacity_factor"),
        ({"capacity_factor": math.inf}, "capacity_factor"),
        ({"capacity_factor": math.nan}, "capacity_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling .* is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_scaling"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": "big"}}, r"rope_parameters\.rope_theta must be a positive number"),
        ({"rope_theta": 0}, "rope_theta must be a positive number"),
        ({"rope_theta": True}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta must be a positive number, not an integer of"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a positive number"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"torch_dtype": "float8"}, "torch_dtype must be one of float32, float16, bfloat16"),
        ({"torch_dtype": ["bfloat16"]}, "torch_dtype"),
        ({"eos_token_id": 32000}, "eos_token_id must be below vocab_size 32000"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"bos_token_id": True}, "bos_token_id"),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**changes)


def test_auto_map_and_unknown_keys_are_ignored() -> None:
    assert parse(auto_map={"AutoModel": "evil.Model"}, surprise={"a": [1]}) == parse()


def test_end_ids_are_the_union_of_both_files() -> None:
    def end_ids(ours: object, generation: object) -> tuple[int, ...]:
        return parse_config(MIXTRAL_8X7B | {"eos_token_id": ours}, {"eos_token_id": generation}).eos_token_ids

    assert end_ids(2, [2, 7]) == (2, 7)
    assert end_ids([5, 5, 2], None) == (5, 2)
    assert end_ids(None, 9) == (9,)
    with pytest.raises(ConfigError, match="eos_token_id"):
        end_ids(2, 32000)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL_8X7B))
    assert load_config(tmp_path) == parse()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 11]}')
    assert load_config(tmp_path) == replace(parse(), eos_token_ids=(2, 11))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "malformed JSON"),
        (b"[]", "not a JSON object"),
        (b'{"vocab_size": NaN}', "NaN"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"model_type": "mixtral", "model_type": "llama"}', "appears twice"),
        (b" " * (MAX_CONFIG_BYTES + 1), "larger than"),
        (b'{"model_type": "gpt5"}', "model_type 'gpt5'"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"config\.json: .*{message}"):
        load_config(tmp_path)


def test_no_folder_no_file_no_regular_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        load_config(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        TINY_MIXTRAL,
        TINY_LLAMA,
        replace(TINY_LLAMA, model_type="mistral", sliding_window=None),
        replace(TINY_MIXTRAL, eos_token_ids=(3, 4), bos_token_id=0, sliding_window=7, tie_word_embeddings=True),
        replace(TINY_MIXTRAL, router_type="switch", capacity_factor=1.25),
        replace(TINY_MIXTRAL, router_type="gshard"),
        replace(TINY_MIXTRAL, head_dim=6, dtype="float16", rope_theta=123456.0, eos_token_ids=(63,)),
    ],
)
def test_a_written_config_reads_back(config: ModelConfig) -> None:
    assert parse_config(json.loads(json.dumps(hf_config(config)))) == config


def test_a_plain_router_is_not_written_down() -> None:
    """Other programs read these files too."""
    assert not {"router_type", "capacity_factor"} & hf_config(TINY_MIXTRAL).keys()


@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_routers(router_type: str) -> None:
    config = parse_config(MIXTRAL_8X7B | {"router_type": router_type, "capacity_factor": 2})
    assert (config.router_type, config.capacity_factor) == (router_type, 2.0)
    config = parse_config(MIXTRAL_8X7B | {"router_type": None, "capacity_factor": None})
    assert (config.router_type, config.capacity_factor) == ("topk_softmax", None)
