from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from engine import plan
from engine.errors import ConfigurationError
from engine.machine import parse_memory
from engine.plan import plan_model
from engine.routing.select import make_router, model_top_k
from engine.sizes import active_params, params_by_kind
from weights.config import ROUTER_TYPES, ModelConfig
from weights.families.mixtral import pieces
from weights.params import ParamKind

MIXTRAL_8X7B = ModelConfig(
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
    rope_theta=1e6,
)
TINY = dataclasses.replace(
    MIXTRAL_8X7B,
    vocab_size=97,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=5,
    num_kv_heads=1,
    head_dim=6,
    max_position_embeddings=100,
    num_experts=7,
    num_experts_per_tok=3,
)


def test_mixtral_8x7b_has_the_known_figures() -> None:
    planned = plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("141GB"))
    assert planned.total_params == 46_702_792_704
    assert planned.active_params == 12_879_925_248
    assert planned.weight_bytes == 93_405_585_408
    assert planned.kv_bytes_per_token == 131_072


EXPERTS = 32 * 8 * 3 * 4096 * 14336
REST = 46_702_792_704 - EXPERTS
EXPERT_SCALES = 32 * 8 * (2 * 14336 + 4096) * 4


def test_on_a_gpu_8_bits_are_for_the_experts() -> None:
    """With a scale of 4 bytes for each row; 1.6 billion parameters of Mixtral 8x7B are in no expert."""
    for name in ("int8", "fp8"):
        planned = plan_model(MIXTRAL_8X7B, quantization=name, memory_bytes=parse_memory("80GiB"))
        assert planned.weight_bytes == EXPERTS + EXPERT_SCALES + 2 * REST
        assert planned.weight_bytes == pytest.approx(48.3e9, rel=1e-3)


def test_on_the_cpu_int8_is_for_all_that_is_large() -> None:
    """Norms and routers are float32 there, whatever the rest is."""
    small = 4 * (32 * 8 * 4096 + (2 * 32 + 1) * 4096)
    rows = 2 * 32_000 + 32 * (6144 + 4096)
    int8 = plan_model(MIXTRAL_8X7B, device="cpu", quantization="int8", memory_bytes=1)
    assert int8.weight_bytes == (46_702_792_704 - small // 4) + small + EXPERT_SCALES + 4 * rows
    whole = plan_model(MIXTRAL_8X7B, device="cpu", memory_bytes=1)
    assert whole.weight_bytes == 2 * (46_702_792_704 - small // 4) + small


def test_experts_that_come_in_fp8_are_held_in_fp8_on_a_gpu() -> None:
    config = dataclasses.replace(MIXTRAL_8X7B, fp8=True, fp8_experts=True)
    asked = plan_model(MIXTRAL_8X7B, quantization="fp8", memory_bytes=1)
    come = plan_model(config, memory_bytes=1)
    assert (come.quantization, come.weight_bytes) == ("fp8", asked.weight_bytes)
    assert plan_model(config, quantization="int8", memory_bytes=1).quantization == "int8"
    assert plan_model(config, device="cpu", memory_bytes=1).quantization is None


def independent_kv_tokens(memory: int, quantization: str | None, kv_width: int) -> int:
    """By hand, from the model's sizes: what 90 % of the memory hold beside weights, the largest step of 2,048 tokens,
    graphs of 256 decodes, and half a GiB for CUDA."""
    weights = 2 * REST + (2 * EXPERTS if quantization is None else EXPERTS + EXPERT_SCALES)
    choices = 2048 * 8
    beside = {
        None: (choices + 16 * 8) * (2 * 14336 + 14336 + 4096) * 2,
        "fp8": (choices + 16 * 8) * (2 * 2 * 14336 + 14336 + 2 * 4096),
        "int8": choices * (14336 + 4096) * 2,
    }[quantization]
    step = 2048 * (4096 + 4096) * 2 + 2048 * 2 * 64 * 4 + beside + 32 * 2**20 + 2048 * 32 * 8 * 16
    graphs = 256 * (4096 + 4096) * 2 + 256 * 2 * 64 * 4 + 256 * 8 * (14336 + 4096) * 2
    left = memory * 9 // 10 - weights - step - graphs - 2**29
    return max(0, left) // (32 * 2 * 8 * 128 * kv_width)


KV_TOKENS = {
    ("80GiB", None, "auto"): 0,
    ("80GiB", None, "fp8"): 0,
    ("80GiB", "fp8", "auto"): 205_652,
    ("80GiB", "fp8", "fp8"): 411_305,
    ("80GiB", "int8", "auto"): 211_106,
    ("80GiB", "int8", "fp8"): 422_213,
    ("141GB", None, "auto"): 238_385,
    ("141GB", None, "fp8"): 476_770,
    ("141GB", "fp8", "auto"): 583_999,
    ("141GB", "fp8", "fp8"): 1_167_998,
    ("141GB", "int8", "auto"): 589_453,
    ("141GB", "int8", "fp8"): 1_178_906,
}
"""The figures of the README."""


@pytest.mark.parametrize(("memory", "quantization", "kv_cache_dtype"), KV_TOKENS, ids=str)
def test_kv_tokens_of_mixtral_8x7b(memory: str, quantization: str | None, kv_cache_dtype: str) -> None:
    planned = plan_model(
        MIXTRAL_8X7B, memory_bytes=parse_memory(memory), quantization=quantization, kv_cache_dtype=kv_cache_dtype
    )
    width = 1 if kv_cache_dtype == "fp8" else 2
    assert planned.kv_bytes_per_token == 65_536 * width
    expected = KV_TOKENS[memory, quantization, kv_cache_dtype]
    assert planned.max_kv_tokens == expected == independent_kv_tokens(parse_memory(memory), quantization, width)
    assert planned.max_batch == expected // 4096


@pytest.mark.parametrize(
    ("memory", "dtype", "fits"),
    [
        ("80GiB", "bfloat16", False),
        ("141GB", "bfloat16", True),
        ("141GB", "float16", True),
        ("141GB", "float32", False),
        ("256GB", "float32", True),
    ],
)
def test_what_fits(memory: str, dtype: str, fits: bool) -> None:
    assert plan_model(MIXTRAL_8X7B, dtype=dtype, memory_bytes=parse_memory(memory)).fits is fits


def test_memory_that_does_not_hold_the_weights_holds_no_tokens() -> None:
    planned = plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("80GiB"))
    assert (planned.max_kv_tokens, planned.max_batch) == (0, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_counts_equal_the_checkpoint_tensors(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    counts = params_by_kind(config)
    elements = sum(torch.Size(piece.shape).numel() for piece in pieces(config))
    assert sum(counts.values()) == elements
    assert (ParamKind.LM_HEAD in counts) is not tied
    assert counts[ParamKind.EXPERT] == 3 * 7 * 3 * 24 * 40
    assert counts[ParamKind.ROUTER] == 3 * 7 * 24


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    one_expert = 3 * 3 * 24 * 40
    total = sum(params_by_kind(TINY).values())
    assert active_params(TINY) == total - (7 - 3) * one_expert
    assert active_params(dataclasses.replace(TINY, num_experts_per_tok=7)) == total


def test_kv_tokens_fill_the_budget_exactly() -> None:
    planned = plan_model(TINY, device="cpu", dtype="float32", memory_bytes=10**9, gpu_memory_utilization=0.5)
    fixed = planned.weight_bytes + planned.activation_bytes + planned.graph_bytes + planned.runtime_bytes
    used = fixed + planned.max_kv_tokens * planned.kv_bytes_per_token
    assert used <= planned.budget_bytes == 5 * 10**8 < used + planned.kv_bytes_per_token
    assert planned.graph_bytes == planned.runtime_bytes == 0
    assert planned.kv_bytes_per_token == 2 * 3 * 1 * 6 * 4
    assert planned.max_batch == planned.max_kv_tokens // 4096


def test_fits_turns_at_the_last_byte() -> None:
    required = plan_model(TINY, memory_bytes=1, max_model_len=33).required_bytes
    for memory, fits in ((required - 1, False), (required, True)):
        planned = plan_model(TINY, memory_bytes=memory, max_model_len=33, gpu_memory_utilization=1.0)
        assert planned.fits is fits
        assert planned.max_kv_tokens == (33 if fits else 32)


def test_context_defaults_to_the_checkpoints() -> None:
    assert plan_model(TINY, memory_bytes=1).max_model_len == 100
    assert plan_model(TINY, memory_bytes=1, max_model_len=7).max_model_len == 7


def test_a_context_beyond_the_checkpoints_is_refused() -> None:
    assert plan_model(TINY, memory_bytes=1, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigurationError, match=r"^max_model_len 101 is over the model's context of 100 tokens$"):
        plan_model(TINY, memory_bytes=1, max_model_len=101)


@pytest.mark.parametrize("num_experts", [1, 2, 7])
@pytest.mark.parametrize("router_type", ROUTER_TYPES)
def test_the_checkpoints_router_says_how_many_experts_a_token_has(router_type: str, num_experts: int) -> None:
    """As many as a server's does."""
    config = dataclasses.replace(TINY, router_type=router_type, num_experts=num_experts, num_experts_per_tok=1)
    if num_experts == 7:
        config = dataclasses.replace(config, num_experts_per_tok=3)
    router = make_router(config, router=None, capacity_factor=None, simulation=None)
    planned = plan_model(config, memory_bytes=1)
    assert planned.max_choices == router.max_choices
    assert planned.config.num_experts_per_tok == model_top_k(config, router)
    idle = num_experts - model_top_k(config, router)
    assert planned.active_params == planned.total_params - idle * 3 * 3 * 24 * 40


def test_what_a_server_was_told_is_not_the_checkpoints_router() -> None:
    config = dataclasses.replace(TINY, router_type="switch", num_experts_per_tok=3)
    planned = plan_model(config, memory_bytes=1, max_choices=7)
    assert (planned.config.num_experts_per_tok, planned.max_choices) == (3, 7)


def test_an_older_card_of_this_machine_has_no_cache_of_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpu_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(plan, "gpu_reads_fp8", lambda: False)
    monkeypatch.setattr(plan, "device_memory", lambda _: 10**9)
    assert plan_model(TINY).kv_cache_dtypes == ("auto",)
    with pytest.raises(ConfigurationError, match=r"^backend cuda has no fp8 KV cache on this card$"):
        plan_model(TINY, kv_cache_dtype="fp8")
    assert plan_model(TINY, kv_cache_dtype="fp8", memory_bytes=10**9).kv_cache_dtypes == ("auto", "fp8")


def test_dtype_defaults_to_the_checkpoints() -> None:
    assert plan_model(dataclasses.replace(TINY, dtype="float16"), memory_bytes=1).dtype == "float16"


def test_json_holds_the_promised_keys() -> None:
    values = json.loads(json.dumps(plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("141GB")).to_json_dict()))
    assert (
        values.items()
        >= {
            "total_params": 46_702_792_704,
            "active_params": 12_879_925_248,
            "weight_bytes": 93_405_585_408,
            "kv_bytes_per_token": 131_072,
            "fits": True,
        }.items()
    )
    assert values["max_kv_tokens"] > 200_000
    assert sum(values["params"].values()) == values["total_params"]


@pytest.mark.parametrize(
    ("options", "device", "backend", "tokens"),
    [
        ({}, "cuda", "cuda", 2048),
        ({"card": "NVIDIA H200"}, "cuda", "cuda", 512),
        ({"card": "NVIDIA H200", "dtype": "float32"}, "cuda", "cuda", 2048),
        ({"backend": "torch"}, "cuda", "torch", 2048),
        ({"device": "cpu"}, "cpu", "cpu", 160),
        ({"device": "cpu", "dtype": "float16"}, "cpu", "torch", 160),
        ({"max_num_batched_tokens": 77}, "cuda", "cuda", 77),
    ],
    ids=str,
)
def test_who_is_planned_for(options: dict[str, Any], device: str, backend: str, tokens: int) -> None:
    planned = plan_model(TINY, memory_bytes=10**9, **options)
    assert (planned.device, planned.backend, planned.max_num_batched_tokens) == (device, backend, tokens)


def test_without_a_memory_this_machine_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gpu_name", lambda: None)
    monkeypatch.setattr(plan, "device_memory", lambda device: {"cpu": 10**9, "cuda": 2 * 10**9}[device])
    planned = plan_model(MIXTRAL_8X7B)
    assert (planned.device, planned.memory_bytes, planned.max_num_batched_tokens) == ("cpu", 10**9, 160)
    monkeypatch.setattr(plan, "gpu_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(plan, "gpu_reads_fp8", lambda: True)
    planned = plan_model(MIXTRAL_8X7B)
    assert (planned.device, planned.memory_bytes, planned.max_num_batched_tokens) == ("cuda", 2 * 10**9, 1152)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "fp8", "device": "cpu"}, "backend cpu has no fp8 weights"),
        ({"quantization": "int8", "backend": "torch"}, "backend torch has no int8 weights"),
        ({"kv_cache_dtype": "fp8", "device": "cpu"}, "backend cpu has no fp8 KV cache"),
        ({"dtype": "int8"}, "dtype 'int8' is not known: use float32, float16, bfloat16"),
        ({"memory_bytes": 0}, "memory_bytes must be at least 1, not 0"),
        ({"max_model_len": 0}, "max_model_len must be at least 1"),
        ({"max_num_batched_tokens": -5}, "max_num_batched_tokens must be at least 1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization must be in (0, 1], not 0.0"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization must be in (0, 1]"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        plan_model(TINY, **({"memory_bytes": 10**9} | options))  # type: ignore[arg-type]
    assert message in str(error.value)


def test_planning_for_a_named_memory_imports_no_torch() -> None:
    code = """
import sys
from engine.machine import parse_memory
from engine.plan import plan_model
from weights.config import ModelConfig

config = ModelConfig(
    model_type="mixtral", vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=4, max_position_embeddings=16, num_experts=2, num_experts_per_tok=1,
)
assert plan_model(config, memory_bytes=parse_memory("1GiB")).fits
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
