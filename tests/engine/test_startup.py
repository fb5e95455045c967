"""Startup: options that cannot work are refused early and by name; devices, dtypes and sizes are picked as told."""

from __future__ import annotations

import os
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import startup
from engine.backends import select
from engine.backends.cpu import CpuBackend
from engine.backends.reference import ReferenceBackend
from engine.backends.select import make_backend
from engine.backends.torch import TorchBackend
from engine.config import EngineConfig
from engine.errors import ConfigurationError
from engine.executor import LocalExecutor
from engine.machine import parse_memory
from engine.plan import MemoryKind, Plan, plan_model
from engine.profile import StepMemory
from engine.startup import DTYPES, pick_device, pick_dtype, start
from engine.startup_checks import check_memory
from engine.types import EngineInfo
from server import flags
from tests.engine.test_plan import MIXTRAL_8X7B
from tests.tiny import TINY_LLAMA, TINY_MIXTRAL, write_tiny_mixtral
from weights.errors import CheckpointError, ConfigError
from weights.families.mixtral import param_specs
from weights.loader import load

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BYTES_PER_TOKEN = 2 * 2 * 2 * 8 * 4  # keys and values, layers, kv heads, head_dim, float32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_mixtral(folder, eos_token_ids=(7, 9))
    return folder


def make_config(model: Path, **options: Any) -> EngineConfig:
    return replace(EngineConfig(model=str(model), device="cpu", kv_cache_memory_bytes=1 << 20), **options)


BAD_OPTIONS: list[dict[str, Any]] = [
    {"max_num_seqs": 0},
    {"max_num_seqs": -1},
    {"max_num_batched_tokens": 0},
    {"block_size": 0},
    {"block_size": -16},
    {"max_model_len": 0},
    {"kv_cache_memory_bytes": 0},
    {"max_num_queued_requests": -1},
    {"gpu_memory_utilization": 0.0},
    {"gpu_memory_utilization": 1.01},
    {"gpu_memory_utilization": -0.5},
    {"gpu_memory_utilization": float("nan")},
    {"gpu_memory_utilization": float("inf")},
    {"load_format": "pt"},
    {"device": "tpu"},
    {"device": "cuda:1"},
    {"dtype": "int8"},
    {"dtype": ""},
    {"backend": "triton"},
    {"quantization": "int4"},
    {"kv_cache_dtype": "fp16"},
    {"router": "hash"},
    {"capacity_factor": 0.0},
    {"capacity_factor": float("nan")},
    {"routing_simulation": "random"},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options_are_named_before_the_model_is_looked_for(options: dict[str, Any]) -> None:
    """A model may have to be downloaded: what is wrong anyway is said first."""
    with pytest.raises(ConfigurationError) as raised:
        start(make_config(Path("/no/such/model"), **options))
    message = str(raised.value)
    assert next(iter(options)) in message
    assert "\n" not in message


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="/no/such/model"):
        start(make_config(Path("/no/such/model")))


def test_a_context_beyond_the_models(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"max_model_len 257 .*256 tokens"):
        start(make_config(checkpoint, max_model_len=257))
    assert start(make_config(checkpoint, max_model_len=256))[1].max_model_len == 256


def test_a_cache_for_less_than_one_sequence_says_how_much_is_needed(checkpoint: Path) -> None:
    needed = 256 * BYTES_PER_TOKEN
    with pytest.raises(ConfigurationError, match=r"holds 240 tokens.*256 tokens needs"):
        start(make_config(checkpoint, kv_cache_memory_bytes=needed - 1))
    _, info = start(make_config(checkpoint, kv_cache_memory_bytes=needed))
    assert info.num_blocks == 16
    _, info = start(make_config(checkpoint, kv_cache_memory_bytes=needed - 1, max_model_len=240))
    assert info.num_blocks == 15


def test_a_cache_that_no_machine_holds(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"kv_cache_memory_bytes .* with --kv-cache-memory-bytes \d+MiB or"):
        start(make_config(checkpoint, kv_cache_memory_bytes=1 << 55))


def test_weights_that_do_not_fit_are_not_loaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on their own, nor with the cache whose size was chosen beside them."""
    chosen = make_config(checkpoint, kv_cache_memory_bytes=256 * BYTES_PER_TOKEN)
    weight_bytes = start(chosen)[1].total_params * 4
    for config, least in (
        (chosen, weight_bytes + 256 * BYTES_PER_TOKEN),
        (replace(chosen, kv_cache_memory_bytes=None), weight_bytes),
    ):
        monkeypatch.setattr(startup, "load", lambda *_, **__: pytest.fail("loaded"))
        monkeypatch.setattr(startup, "device_memory", lambda _, least=least: int(least / 0.9) - 2)
        with pytest.raises(ConfigurationError, match="the weights take"):
            start(config)
        monkeypatch.undo()
        monkeypatch.setattr(startup, "device_memory", lambda _, least=least: int(least / 0.9) + 2)
        start(config)
        monkeypatch.undo()


def test_a_cache_that_the_cpu_cannot_have_is_found_before_the_load(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default it is a quarter of what the weights leave free: 256 tokens of 256 bytes do not fit into a quarter of
    200,000 bytes."""
    config = make_config(checkpoint, kv_cache_memory_bytes=None)
    weight_bytes = start(config)[1].total_params * 4
    monkeypatch.setattr(startup, "load", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(startup, "available_host_memory", lambda: weight_bytes + 200_000)
    with pytest.raises(ConfigurationError, match=r"the KV cache of 50,000 bytes holds 192 tokens, but one"):
        start(config)
    monkeypatch.undo()
    monkeypatch.setattr(startup, "available_host_memory", lambda: weight_bytes + 4 * 256 * BYTES_PER_TOKEN)
    start(config)


def test_what_would_fit_is_said_when_weights_do_not(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "device_memory", lambda _: 100_000)
    with pytest.raises(ConfigurationError) as raised:
        start(make_config(checkpoint))
    found = re.fullmatch(
        r"the weights take .* kB in float32, kv_cache_memory_bytes 1\.0 MB; this device has 100\.0 kB and may use 90% "
        r"of it\. It would fit with a memory of ([\d.]+) (.B)\.",
        str(raised.value),
    )
    assert found is not None
    monkeypatch.setattr(startup, "device_memory", lambda _: parse_memory(found[1] + found[2]))
    start(make_config(checkpoint))


def test_on_a_gpu_the_longest_sequence_must_fit_beside_the_weights() -> None:
    plan = plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("107GB"))
    assert plan.weight_bytes < plan.budget_bytes < plan.weight_bytes + 32768 * 131_072
    with pytest.raises(ConfigurationError) as raised:
        check(plan)
    assert str(raised.value) == (
        "the weights take 93.4 GB in bfloat16, one sequence of 32,768 tokens 4.3 GB; this device has 107.0 GB and may "
        "use 90% of it. It would fit with --quantization fp8, --quantization int8, --max-model-len 4864 "
        "or a memory of 111.1 GB."
    )
    check(plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("107GB"), max_model_len=1024))


def check(plan: Plan) -> None:
    check_memory(plan, block_size=16, could_narrow=False)


def test_a_cache_whose_size_was_chosen_must_fit_beside_the_weights() -> None:
    def planned(kv_cache: str) -> Plan:
        return plan_model(
            MIXTRAL_8X7B,
            quantization="fp8",
            memory_bytes=parse_memory("80GiB"),
            kv_cache_memory_bytes=parse_memory(kv_cache),
        )

    with pytest.raises(ConfigurationError) as raised:
        check(planned("60GB"))
    assert str(raised.value) == (
        "the weights take 48.3 GB in fp8, kv_cache_memory_bytes 60.0 GB; this device has 85.9 GB and may use 90% of "
        "it. It would fit with --kv-cache-memory-bytes 25706MiB or a memory of 122.7 GB."
    )
    check(planned("25706MiB"))
    assert planned("25706MiB").fits
    assert not planned("25707MiB").fits
    with pytest.raises(ConfigurationError, match=r"the KV cache of 1,000,000,000 bytes holds 7616 tokens"):
        check(planned("1GB"))


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference"])
def test_only_the_gpus_backend_has_a_cache_of_fp8(backend: str, checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"kv_cache_dtype fp8 is for backend cuda, not (cpu|torch|reference)$"):
        start(make_config(checkpoint, backend=backend, kv_cache_dtype="fp8"))


@pytest.mark.parametrize(
    ("backend", "dtype", "quantization"),
    [
        ("cpu", "float32", None),
        ("cpu", "bfloat16", None),
        ("cpu", "float32", "int8"),
        ("torch", "bfloat16", None),
        ("reference", "float16", None),
    ],
)
def test_weights_and_cache_take_what_was_planned(
    backend: str, dtype: str, quantization: str | None, tmp_path: Path
) -> None:
    """With heads of 16, which no backend has to pad."""
    write_tiny_mixtral(tmp_path, head_dim=16)
    _, info = start(make_config(tmp_path, backend=backend, dtype=dtype, quantization=quantization))
    assert info.memory.measured.keys() == {"weights", "KV cache"}
    assert info.memory.measured == info.memory.predicted
    assert info.memory.measured["weights"] == sum(info.memory.weights.values())


class FakeMeter:
    """Of a device of 2 MB, of which `others` hold some; the engine's own is what the test says."""

    def __init__(self) -> None:
        self.held = 1000
        self.others = 50_000

    def reset(self) -> None:
        pass

    def peak(self) -> int:
        raise AssertionError("steps are measured elsewhere")

    def allocated(self) -> int:
        return self.held

    def free(self) -> int:
        return self.total() - self.held - self.others

    def total(self) -> int:
        return 2_000_000


@pytest.mark.parametrize(("backend", "graph_bytes"), [("reference", 0), ("cuda", 20_000)])
def test_the_cache_gets_what_is_left_beside_what_was_measured(
    backend: str, graph_bytes: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 300 kB, 7 kB for what stays of the first step, 100 kB for a step, 20 kB for the graphs."""
    meter = FakeMeter()

    def loaded(*args: Any, **kwargs: Any) -> Any:
        meter.held += 300_000
        return load(*args, **kwargs)

    def measured(*_: Any, **options: Any) -> StepMemory:
        assert options["max_choices"] == 4
        meter.held += 7000
        return StepMemory(step=100_000, decode=20_000)

    monkeypatch.setattr(startup, "meter_of", lambda _: meter)
    monkeypatch.setattr(startup, "load", loaded)
    monkeypatch.setattr(startup, "measure_steps", measured)
    monkeypatch.setattr(ReferenceBackend, "name", backend)
    _, info = start(make_config(checkpoint, backend="reference", kv_cache_memory_bytes=None))
    left = 1_800_000 - 50_000 - 1000 - 307_000 - 100_000 - graph_bytes
    assert info.num_blocks == left // (16 * BYTES_PER_TOKEN)
    memory = info.memory
    assert memory.measured["weights"] == 300_000
    assert memory.measured["activations"] == memory.activations == 107_000
    assert memory.measured["CUDA itself"] == 50_000
    assert memory.graphs == memory.measured["CUDA graphs"] == graph_bytes
    assert memory.measured["KV cache"] == memory.kv_cache == info.num_blocks * 16 * BYTES_PER_TOKEN
    assert memory.predicted.keys() == memory.measured.keys() == set(MemoryKind)
    assert {type(kind) for kind in memory.measured} == {str}, "other processes read it"


def test_a_padded_head_takes_more_than_was_planned(checkpoint: Path) -> None:
    memory = start(make_config(checkpoint))[1].memory
    assert memory.measured["KV cache"] == 2 * memory.predicted["KV cache"]
    assert memory.measured["weights"] > memory.predicted["weights"]


def test_a_dense_model_is_pointed_to_upcycling(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path, TINY_LLAMA)
    with pytest.raises(ConfigurationError, match=r"'llama' cannot be served.*mixtral.*upcycle"):
        start(make_config(tmp_path))


def test_a_checkpoint_without_configuration(tmp_path: Path) -> None:
    for load_format in ("auto", "dummy"):
        with pytest.raises(ConfigError, match=r"config\.json"):
            start(make_config(tmp_path, load_format=load_format))


def test_what_a_started_engine_says_of_itself(checkpoint: Path) -> None:
    config = make_config(checkpoint, max_num_seqs=3, max_num_batched_tokens=50, block_size=5, max_model_len=99, seed=4)
    executor, info = start(config)
    assert isinstance(executor, LocalExecutor)
    params = sum(torch.Size(spec.shape).numel() for spec in param_specs(TINY_MIXTRAL))
    block_bytes = 5 * BYTES_PER_TOKEN
    expected: dict[str, Any] = {
        "model": str(checkpoint),
        "model_type": "mixtral",
        "device": "cpu",
        "dtype": "float32",
        "backend": "cpu",
        "vocab_size": 64,
        "num_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "max_model_len": 99,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 50,
        "block_size": 5,
        "num_blocks": (1 << 20) // block_bytes,
        "enable_prefix_caching": True,
        "router": "topk_softmax",
        "capacity_factor": None,
        "routing_simulation": None,
        "record_routing": False,
        "max_experts_per_tok": 4,
        "expert_params": 2 * 3 * 32 * 48,
        "eos_token_ids": (7, 9),
        "total_params": params,
        "active_params": params - 2 * 2 * 3 * 32 * 48,  # 2 layers, 2 of 4 experts rest, w1, w2 and w3
        "load_bytes": params * 4,
        "pid": os.getpid(),
    }
    assert {name: getattr(info, name) for name in expected} == expected
    assert {field.name for field in fields(EngineInfo)} - expected.keys() == {"load_seconds", "memory"}
    assert sum(info.memory.weights.values()) == params * 4
    assert info.memory.weights["router"] == 2 * 4 * 32 * 4
    assert info.memory.kv_cache == info.num_blocks * block_bytes
    cache = executor.runner.cache
    assert cache.keys.nbytes + cache.values.nbytes == 2 * info.memory.kv_cache, "heads of 8, padded to 16"
    assert (cache.num_blocks, cache.block_size) == (info.num_blocks, 5)
    assert info.memory.activations > 0
    assert info.load_seconds >= 0


@pytest.mark.parametrize(
    ("options", "cached"),
    [
        ({}, True),
        ({"enable_prefix_caching": False}, False),
        ({"capacity_factor": 1.25}, False),
        ({"router": "switch"}, True),
        ({"router": "switch", "capacity_factor": 8.0}, False),
        ({"router": "gshard"}, False),
        ({"router": "noisy_topk"}, False),
        ({"router": "topk_softmax"}, True),
        ({"routing_simulation": "even"}, False),  # whose turn it is depends on the place in the batch
        ({"routing_simulation": "zipf"}, False),
    ],
    ids=str,
)
def test_blocks_that_depend_on_others_or_on_chance_are_not_shared(
    checkpoint: Path, options: dict[str, Any], cached: bool
) -> None:
    _, info = start(make_config(checkpoint, **options))
    assert info.enable_prefix_caching == cached
    assert info.router == options.get("routing_simulation", options.get("router", "topk_softmax"))
    assert info.capacity_factor == options.get("capacity_factor")


@pytest.mark.parametrize(
    ("config", "cached"),
    [
        ({"router_type": "gshard"}, False),
        ({"router_type": "switch", "capacity_factor": 1.0}, False),
        ({"router_type": "switch"}, True),
        ({"router_type": "noisy_topk"}, True),  # trained with noise, served without
    ],
    ids=str,
)
def test_the_checkpoint_chooses_its_router(tmp_path: Path, config: dict[str, Any], cached: bool) -> None:
    write_tiny_mixtral(tmp_path, **config)
    _, info = start(make_config(tmp_path, record_routing=True))
    assert (info.router, info.capacity_factor) == (config["router_type"], config.get("capacity_factor"))
    most = {"switch": 1, "gshard": 2, "noisy_topk": 4}[info.router]
    assert (info.max_experts_per_tok, info.num_experts_per_tok) == (most, min(most, 2))
    assert info.enable_prefix_caching == cached
    experts = 2 * 3 * 32 * 48
    assert info.expert_params == experts
    assert info.total_params - info.active_params == (4 - info.num_experts_per_tok) * experts
    assert info.record_routing


def test_dummy_weights_need_a_configuration_only(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    config = make_config(tmp_path, load_format="dummy", dtype="bfloat16", backend="reference")
    _, info = start(config)
    assert (info.dtype, info.backend) == ("bfloat16", "reference")
    assert info.load_bytes == info.total_params * 2


@pytest.mark.parametrize(
    ("name", "available", "expected"),
    [("auto", True, CUDA), ("auto", False, CPU), ("cpu", True, CPU), ("cpu", False, CPU), ("cuda", True, CUDA)],
)
def test_devices(name: str, available: bool, expected: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device(name) == expected


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match="no GPU"):
        pick_device("cuda")


@pytest.mark.parametrize("of_checkpoint", ["float32", "float16", "bfloat16"])
def test_dtypes(of_checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY_MIXTRAL, dtype=of_checkpoint)
    for name in ("float32", "float16", "bfloat16"):
        assert pick_dtype(name, config, CPU) == pick_dtype(name, config, CUDA) == name
    assert pick_dtype("auto", config, CPU) == of_checkpoint
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert pick_dtype("auto", config, CUDA) == of_checkpoint
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert pick_dtype("auto", config, CUDA) == ("float16" if of_checkpoint == "bfloat16" else of_checkpoint)


def test_backends() -> None:
    def make(name: str, dtype: torch.dtype = torch.float32, quantization: str | None = None) -> object:
        return make_backend(name, TINY_MIXTRAL, device=CPU, dtype=dtype, quantization=quantization)

    assert isinstance(make("auto"), CpuBackend)
    assert isinstance(make("auto", torch.float16), TorchBackend)
    assert isinstance(make("cpu", quantization="int8"), CpuBackend)
    assert isinstance(make("torch"), TorchBackend)
    assert isinstance(make("reference"), ReferenceBackend)
    with pytest.raises(ConfigurationError, match="float32 or bfloat16, not float16"):
        make("cpu", torch.float16)
    with pytest.raises(ConfigurationError, match="quantization int8 needs the CPU kernels"):
        make("auto", torch.float16, "int8")
    with pytest.raises(ConfigurationError, match="backend torch has no int8 weights"):
        make("torch", quantization="int8")
    with pytest.raises(ConfigurationError, match=r"^quantization int8 needs --backend cuda on a GPU$"):
        make_backend("auto", TINY_MIXTRAL, device=CUDA, dtype=torch.bfloat16, quantization="int8")
    for name in ("auto", "cpu", "torch", "reference"):
        with pytest.raises(ConfigurationError, match="only backend cuda has fp8 weights"):
            make(name, quantization="fp8")
    with pytest.raises(ConfigurationError, match="backend cuda needs a GPU"):
        make("cuda")


def test_the_gpu_backend_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match="needs Triton, which is not installed"):
        make_backend("cuda", TINY_MIXTRAL, device=CUDA, dtype=torch.bfloat16)


def test_every_backend_is_a_choice_of_the_command_line() -> None:
    assert flags.BACKENDS == select.BACKENDS
    assert set(DTYPES) | {"auto"} == set(flags.DTYPES)


def test_torch_serves_where_no_kernels_were_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(select, "best", lambda: None)
    backend = make_backend("auto", TINY_MIXTRAL, device=CPU, dtype=torch.float32)
    assert isinstance(backend, TorchBackend)
    assert "no C++ compiler" in caplog.text
    with pytest.raises(ConfigurationError, match="no C\\+\\+ compiler"):
        make_backend("cpu", TINY_MIXTRAL, device=CPU, dtype=torch.float32)
