"""Part "decode": tokens a second at a few batch sizes, on random weights in the shape of Mixtral 8x7B."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.types import Request, SamplingParams
from tests.bench.card.models import TINY, TINY_CACHE_BYTES, as_deep_as_fits
from tests.bench.card.report import Part, Setting
from weights.config import hf_config


def decode(setting: Setting, part: Part) -> None:
    prompt_len, output_len, batch_sizes = (8, 8, (1, 3)) if setting.tiny else (128, 128, (1, 8, 32, 128))
    part.set(prompt_len=prompt_len, output_len=output_len)
    on_gpu: list[tuple[str, str | None]] = [("cuda", "fp8"), ("cuda", None), ("torch", None)]
    for backend, quantization in on_gpu if setting.device.type == "cuda" else [("auto", None)]:
        if not part.has_time(f"{backend} {quantization}"):
            return
        core = build(setting, backend, quantization, prompt_len + output_len, max(batch_sizes))
        info = core.info
        name = {"backend": info.backend, "quantization": quantization}
        part.row(
            "models",
            **name,
            num_layers=info.num_layers,
            total_params=info.total_params,
            dtype=info.dtype,
            load_seconds=info.load_seconds,
        )
        generate(core, batch_size=1, prompt_len=prompt_len, output_len=2)  # first use of every kernel
        for batch_size in batch_sizes:
            if part.has_time(f"{backend} {quantization}, batch {batch_size}"):
                core.reset_experts()
                times = generate(core, batch_size=batch_size, prompt_len=prompt_len, output_len=output_len)
                layers = core.expert_report().total.layers
                distinct = sum(layer.distinct_experts for layer in layers) / len(layers)
                peak = core.stats().peak_memory_bytes
                row = {"batch_size": batch_size, **times, "distinct_experts": distinct, "peak_memory_bytes": peak}
                part.row("batches", **name, **row)
        del core
        gc.collect()  # before the next model is made
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(setting.device)


def build(setting: Setting, backend: str, quantization: str | None, context: int, batch_size: int) -> EngineCore:
    config = TINY if setting.tiny else as_deep_as_fits(setting.device, context * batch_size, quantization)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(hf_config(config)))
        return EngineCore.build(
            EngineConfig(
                model=folder,
                device=setting.device.type,
                backend=backend,
                quantization=quantization,
                load_format="dummy",
                record_routing=True,  # a rate says little without the experts that took part
                max_model_len=context,
                max_num_seqs=batch_size,
                kv_cache_memory_bytes=TINY_CACHE_BYTES if setting.tiny else None,
                enable_prefix_caching=False,
            )
        )


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
