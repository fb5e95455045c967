from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine import plan
from engine.backends.torch import TorchBackend
from engine.errors import ConfigurationError
from engine.models.registry import build_model
from engine.plan import parse_memory, plan_model
from engine.routing.steering import SteeringTable
from engine.routing.topk_softmax import TopKSoftmax
from engine.runner import Runner
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence
from engine.types import Request, SamplingParams
from weights import dummy
from weights.config import ModelConfig
from weights.families.mixtral import param_specs, pieces
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


def test_8_bits_are_for_all_that_is_large_or_for_the_experts_alone() -> None:
    """1.6 billion parameters of Mixtral 8x7B are in no expert; norms and routers, a few more, never have 8 bits."""
    sizes = {
        (name, experts_only): plan_model(
            MIXTRAL_8X7B, quantization=name, experts_only=experts_only, memory_bytes=parse_memory("80GiB")
        ).weight_bytes
        for name in ("int8", "fp8")
        for experts_only in (False, True)
    }
    experts = 32 * 8 * 3 * 4096 * 14336
    assert sizes["fp8", False] == sizes["fp8", True] == sizes["int8", True] == experts + 2 * (46_702_792_704 - experts)
    assert sizes["int8", False] == 46_702_792_704 + 32 * 8 * 4096 + (2 * 32 + 1) * 4096


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
    counts = plan.params_by_kind(config)
    elements = sum(torch.Size(piece.shape).numel() for piece in pieces(config))
    assert sum(counts.values()) == elements
    assert (ParamKind.LM_HEAD in counts) is not tied
    assert counts[ParamKind.EXPERT] == 3 * 7 * 3 * 24 * 40
    assert counts[ParamKind.ROUTER] == 3 * 7 * 24


def test_active_parameters_leave_out_the_experts_not_chosen() -> None:
    one_expert = 3 * 3 * 24 * 40
    total = sum(plan.params_by_kind(TINY).values())
    assert plan.active_params(TINY) == total - (7 - 3) * one_expert
    assert plan.active_params(dataclasses.replace(TINY, num_experts_per_tok=7)) == total


def test_kv_tokens_fill_the_budget_exactly() -> None:
    planned = plan_model(TINY, dtype="float32", memory_bytes=10**8, gpu_memory_utilization=0.5)
    used = planned.weight_bytes + planned.activation_bytes + planned.max_kv_tokens * planned.kv_bytes_per_token
    assert used <= planned.budget_bytes == 5 * 10**7 < used + planned.kv_bytes_per_token
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


def test_dtype_defaults_to_the_checkpoints() -> None:
    assert plan_model(dataclasses.replace(TINY, dtype="float16"), memory_bytes=1).dtype == "float16"


def measured_peak(config: ModelConfig, dtype: torch.dtype, *, tokens: int, seqs: int, context: int, trace: Path) -> int:
    """Bytes that a step's tensors take at most: `seqs` sequences, the first at the end of `context` tokens."""
    backend = TorchBackend(param_specs(config), device=torch.device("cpu"), dtype=dtype)
    dummy.load(config, backend, device="cpu", dtype=dtype, seed=0)
    model = build_model(config, backend, TopKSoftmax(config.num_experts, renormalize=True))
    num_blocks = -(-context // 16)
    cache = backend.new_kv_cache(config.num_layers, num_blocks + seqs, 16, model.attention_shape)
    params = SamplingParams(top_p=0.9, repetition_penalty=1.1, seed=1)
    chunks = []
    for index in range(seqs):
        length, computed = (context, tokens - seqs + 1) if index == 0 else (1, 1)
        request = Request(request_id=str(index), prompt_ids=(1,) * length, params=params)
        sequence = Sequence(request, arrival=index, seed=index)
        sequence.block_table = list(range(num_blocks)) if index == 0 else [num_blocks + index]
        chunks.append(Chunk(sequence, length - computed, computed))
    table = SteeringTable.for_model(config, num_slots=seqs + 1, device=torch.device("cpu"))
    runner = Runner(model, cache, table, eos_token_ids=frozenset())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        runner.run(StepPlan(tuple(chunks)))
    profiler.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    allocated = [(event["ts"], event["args"]["Total Allocated"], event["args"]["Bytes"]) for event in events]
    _, first_total, first_bytes = min(allocated)
    return int(max(total for _, total, _ in allocated) - (first_total - first_bytes))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The CPU's attention kernel has a workspace a thread, which is no part of the estimate."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("changes", "tokens", "seqs", "context"),
    [
        pytest.param({"intermediate_size": 896}, 512, 2, 512, id="wide experts"),
        pytest.param({"num_experts_per_tok": 4}, 512, 2, 512, id="many experts"),
        pytest.param({}, 512, 2, 4096, id="long context"),
        pytest.param({"num_heads": 16, "num_experts_per_tok": 1}, 512, 2, 512, id="many heads"),
        pytest.param({"vocab_size": 20_000}, 48, 48, 48, id="many sampled rows"),
    ],
)
def test_activations_are_what_a_step_takes(
    changes: dict[str, int], tokens: int, seqs: int, context: int, dtype: str, tmp_path: Path
) -> None:
    config = dataclasses.replace(
        TINY,
        vocab_size=500,
        hidden_size=256,
        intermediate_size=32,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=context,
    )
    config = dataclasses.replace(config, **changes)  # type: ignore[arg-type]
    estimate = plan.activation_bytes(config, dtype, max_num_batched_tokens=tokens, max_num_seqs=seqs)
    measured = measured_peak(
        config, getattr(torch, dtype), tokens=tokens, seqs=seqs, context=context, trace=tmp_path / "trace.json"
    )
    # On the CPU one expert's rows are computed at a time, the estimate has all of them at once, as on a GPU.
    assert 0.85 * measured < estimate < 2 * measured


def test_activations_of_mixtral_8x7b() -> None:
    """The worked example of the docstring."""
    estimate = plan.activation_bytes(
        MIXTRAL_8X7B, "bfloat16", max_num_batched_tokens=2048, max_num_seqs=256, max_model_len=4096
    )
    assert estimate == 4096 * 131_072 + 2048 * 2 * 4096 * 2


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


def test_table_says_what_fits_and_what_would() -> None:
    fits = plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("141GB")).table()
    assert "46,702,792,704" in fits
    assert "12,879,925,248" in fits
    assert "93.4 GB" in fits
    assert fits.splitlines()[-1].startswith("Fits: ")
    short = plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("80GiB"))
    assert short.table().splitlines()[-1].startswith("Does not fit: ")
    assert f"{short.required_bytes / 0.9 / 1e9:.1f} GB would do" in short.table()
    assert all(line == line.rstrip() for line in fits.splitlines())


@pytest.mark.parametrize(
    ("options", "message"),
    [
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


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GiB", 85_899_345_920),
        ("141GB", 141_000_000_000),
        ("512MiB", 536_870_912),
        ("123", 123),
        ("123B", 123),
        (" 1.5 gib ", 1_610_612_736),
        ("0.1GB", 100_000_000),
        ("2KiB", 2048),
        ("3kB", 3000),
        ("1TiB", 1 << 40),
    ],
)
def test_parse_memory(text: str, num_bytes: int) -> None:
    assert parse_memory(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "80 GiB 2", "80XB", "80G", "1e9", "nan", "1.GB", "٣GB", "1_000"])
def test_parse_memory_refuses_what_it_does_not_know(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount of memory: write 80GiB, 141GB, 512MiB or a number of bytes"):
        parse_memory(text)


@pytest.mark.parametrize("text", ["0", "0GB", "0.1B"])
def test_parse_memory_refuses_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="is no memory at all"):
        parse_memory(text)


@given(st.integers(1, 10**18))
def test_parse_memory_is_exact(num_bytes: int) -> None:
    assert parse_memory(str(num_bytes)) == num_bytes
    assert parse_memory(f"{num_bytes}KiB") == num_bytes * 1024


def test_device_memory_of_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="no GPU is available"):
        plan.device_memory("cuda")
    assert plan.device_memory("auto") == plan.device_memory("cpu")


def test_planning_for_a_named_memory_imports_no_torch() -> None:
    code = """
import sys
from engine.plan import parse_memory, plan_model
from weights.config import ModelConfig

config = ModelConfig(
    model_type="mixtral", vocab_size=9, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1,
    head_dim=4, max_position_embeddings=16, num_experts=2, num_experts_per_tok=1,
)
assert plan_model(config, memory_bytes=parse_memory("1GiB")).fits
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
