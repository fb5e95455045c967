"""Checks and times the engine on one device, and writes what it found to one JSON file.

    python tests/bench/card.py --out DIR                 # on a GPU: everything
    python tests/bench/card.py --out DIR --part smoke    # one part (may be given several times)
    python tests/bench/card.py --out DIR --tiny          # seconds, on any machine: that the script itself works

Needs torch, numpy, safetensors, tokenizers and jinja2, and no installation: it runs from a checkout. A part that fails
is recorded with its traceback, the others still run, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from engine import batch as batches
from engine.backends.select import make_backend
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.models.registry import build_model
from engine.plan import plan_model
from engine.routing.select import make_router
from engine.routing.steering import SteeringTable
from engine.scheduler import Chunk, StepPlan
from engine.sequence import Sequence as EngineSequence
from engine.startup import DTYPES, pick_device
from engine.types import Request, SamplingParams, TokenEvent
from tests.tiny import write_tiny_mixtral
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig, hf_config
from weights.loader import load

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
# Small enough for the reference backend; sizes are multiples of 8, which grouped GEMMs need.
TINY = dataclasses.replace(
    MIXTRAL_8X7B,
    vocab_size=512,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    num_experts=6,
    dtype="float32",
)
TINY_CACHE_BYTES = 1 << 20
PROMPT_LENGTHS = (1, 5, 17, 33)
CLOSE_CALL = 1e-3
"""Greedy tokens may differ from the step on whose two best logits are closer than this."""


@dataclass(frozen=True)
class Setting:
    device: torch.device
    tiny: bool


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Checks and times the engine on one device.")
    parser.add_argument("--out", type=Path, required=True, help="folder for card.json")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny models only")
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="default: all")
    options = parser.parse_args(argv)
    setting = Setting(pick_device(options.device), options.tiny)
    report: dict[str, Any] = {"machine": describe(setting.device), "tiny": options.tiny, "parts": {}}
    for name in options.part or PARTS:
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        try:
            result = PARTS[name](setting)
        except Exception:
            result = {"error": traceback.format_exc()}
            print(result["error"], file=sys.stderr, flush=True)
        report["parts"][name] = result | {"seconds": round(time.perf_counter() - start, 3)}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "card.json").write_text(json.dumps(report, indent=2) + "\n")
    failed = [name for name, result in report["parts"].items() if "error" in result]
    print(f"failed: {', '.join(failed)}" if failed else "all parts passed")
    return 1 if failed else 0


def describe(device: torch.device) -> dict[str, Any]:
    machine = {"python": platform.python_version(), "torch": torch.__version__, "device": "cpu"}
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
        machine["capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
        machine["memory_gb"] = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.1f}"
    return machine


# Part "smoke": the torch backend computes what the reference computes, in one forward pass and through the engine.


def smoke(setting: Setting) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_mixtral(folder, TINY)
        exact = logits_of(folder, "reference", "float32", setting.device)
        errors = {}
        for backend, dtype in (("torch", "float32"), ("torch", "bfloat16"), ("reference", "bfloat16")):
            errors[f"{backend} {dtype}"] = relative_error(logits_of(folder, backend, dtype, setting.device), exact)
        print(f"error of logits against the reference: {errors}", flush=True)
        assert errors["torch float32"] < 1e-4, errors
        assert errors["torch bfloat16"] < max(0.03, 2 * errors["reference bfloat16"]), errors
        same, num_tokens = compare_greedy(folder, setting)
    print(f"greedy tokens equal to the reference's: {same} of {num_tokens}", flush=True)
    return {"logits_error": errors, "greedy_equal": same, "greedy_tokens": num_tokens}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of `expected`."""
    return float((actual - expected).norm() / expected.norm())


@torch.inference_mode()
def logits_of(folder: Path, backend_name: str, dtype: str, device: torch.device) -> Tensor:
    """Logits [T, V] float32 of prompts of `PROMPT_LENGTHS`: a batch of all but their last tokens, then one of those."""
    checkpoint = open_checkpoint(folder)
    config = checkpoint.config
    backend = make_backend(backend_name, config, device=device, dtype=DTYPES[dtype])
    load(checkpoint, backend)
    router = make_router(config, router=None, capacity_factor=None, simulation=None)
    model = build_model(config, backend, router)
    steering = SteeringTable.for_model(config, num_slots=1, device=device)
    block_size, num_blocks = 16, 8
    cache = backend.new_kv_cache(config.num_layers, num_blocks, block_size, model.attention_shape)
    sequences = [EngineSequence(request, arrival=i, seed=0) for i, request in enumerate(requests(config, 1))]
    free = iter(range(num_blocks))
    for sequence in sequences:
        sequence.block_table = [next(free) for _ in range(-(-sequence.num_tokens // block_size))]
    prompts = StepPlan(tuple(Chunk(s, 0, s.num_tokens - 1) for s in sequences if s.num_tokens > 1))
    last = StepPlan(tuple(Chunk(s, s.num_tokens - 1, 1) for s in sequences))
    logits = []
    for plan in (prompts, last):
        hidden = model.forward(batches.build(plan, block_size=block_size, steering=steering, device=device), cache)
        logits.append(model.logits(hidden))
    return torch.cat(logits)


def requests(config: ModelConfig, max_tokens: int) -> list[Request]:
    """One greedy request a prompt length, of ids that differ."""
    params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=2, ignore_eos=True)
    return [
        Request(
            request_id=str(length),
            prompt_ids=tuple((7 * i + 13 * length) % config.vocab_size for i in range(length)),
            params=params,
        )
        for length in PROMPT_LENGTHS
    ]


def compare_greedy(folder: Path, setting: Setting) -> tuple[int, int]:
    """(greedy tokens that agree before the first close call, tokens generated). Raises where others differ."""
    outputs = []
    for backend in ("reference", "torch"):
        core = EngineCore.build(
            EngineConfig(
                model=str(folder), device=setting.device.type, backend=backend, kv_cache_memory_bytes=TINY_CACHE_BYTES
            )
        )
        outputs.append(drain(core, requests(TINY, 12)))
    same = total = 0
    for request_id, expected in outputs[0].items():
        actual = outputs[1][request_id]
        assert len(actual) == len(expected) == 12
        total += 12
        for ours, theirs in zip(actual, expected, strict=True):
            if gap(theirs) < CLOSE_CALL:
                break
            assert ours.token_ids == theirs.token_ids, f"request {request_id}: {ours} instead of {theirs}"
            same += 1
    return same, total


def gap(event: TokenEvent) -> float:
    assert event.logprobs is not None
    (_, best), (_, second) = event.logprobs[0].top
    return best - second


def drain(core: EngineCore, work: Sequence[Request]) -> dict[str, list[TokenEvent]]:
    """Run requests to their ends: their events by request id."""
    events: dict[str, list[TokenEvent]] = {request.request_id: [] for request in work}
    for request in work:
        core.add(request)
    while core.has_work:
        for event in core.step():
            assert event.error is None, event.error
            events[event.request_id].append(event)
    return events


# Part "decode": tokens a second at a few batch sizes, on random weights in the shape of Mixtral 8x7B.


def decode(setting: Setting) -> dict[str, Any]:
    prompt_len, output_len, batch_sizes = (8, 8, (1, 3)) if setting.tiny else (128, 128, (1, 8, 32, 128))
    context = prompt_len + output_len
    config = TINY if setting.tiny else as_deep_as_fits(setting.device, context * max(batch_sizes))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(config)))
        core = EngineCore.build(
            EngineConfig(
                model=folder,
                device=setting.device.type,
                load_format="dummy",
                max_model_len=context,
                max_num_seqs=max(batch_sizes),
                kv_cache_memory_bytes=TINY_CACHE_BYTES if setting.tiny else None,
                enable_prefix_caching=False,
            )
        )
    info = core.info
    print(
        f"{info.num_layers} layers, {info.total_params / 1e9:.2f} B parameters, {info.dtype}, {info.device}", flush=True
    )
    generate(core, batch_size=1, prompt_len=prompt_len, output_len=2)  # first use of every kernel
    rows = []
    for batch_size in batch_sizes:
        row = generate(core, batch_size=batch_size, prompt_len=prompt_len, output_len=output_len)
        rows.append({"batch_size": batch_size} | row)
        print("  ".join(f"{key} {value:,.1f}" for key, value in rows[-1].items()), flush=True)
    return {
        "num_layers": info.num_layers,
        "total_params": info.total_params,
        "dtype": info.dtype,
        "load_seconds": info.load_seconds,
        "peak_memory_bytes": core.stats().peak_memory_bytes,
        "prompt_len": prompt_len,
        "output_len": output_len,
        "batches": rows,
    }


def as_deep_as_fits(device: torch.device, num_tokens: int) -> ModelConfig:
    """Mixtral 8x7B with as many of its 32 layers as leave room for `num_tokens` tokens of KV cache."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    for num_layers in range(MIXTRAL_8X7B.num_layers, 0, -1):
        config = dataclasses.replace(MIXTRAL_8X7B, num_layers=num_layers)
        plan = plan_model(config, memory_bytes=free, max_model_len=4096)
        if plan.fits and plan.max_kv_tokens >= num_tokens:
            return config
    raise RuntimeError("not even one layer of Mixtral 8x7B fits: use --tiny")


def generate(core: EngineCore, *, batch_size: int, prompt_len: int, output_len: int) -> dict[str, float]:
    """Time one batch. Prefill ends with the step in which the last request gets its first token."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    for index in range(batch_size):
        ids = tuple((index * 7919 + i * 31) % core.info.vocab_size for i in range(prompt_len))
        core.add(Request(request_id=f"{batch_size}-{index}", prompt_ids=ids, params=params))
    started: set[str] = set()
    decoded = 0
    start = prefilled = time.perf_counter()
    while core.has_work:
        prefilling = len(started) < batch_size
        events = core.step()
        now = time.perf_counter()
        assert all(event.error is None for event in events), events
        if prefilling:
            started.update(event.request_id for event in events)
            prefilled = now
        else:
            decoded += sum(len(event.token_ids) for event in events)
    return {
        "prefill_tokens_per_s": batch_size * prompt_len / (prefilled - start),
        "decode_tokens_per_s": decoded / (now - prefilled),
        "step_ms": 1e3 * (now - prefilled) * batch_size / decoded,
    }


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {"smoke": smoke, "decode": decode}

if __name__ == "__main__":
    sys.exit(main())
