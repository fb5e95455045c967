"""Engines to measure: a model of random weights on the device, in the formats that fit, and work for it."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from engine.types import Request, SamplingParams
from tests.bench.card.models import MIXTRAL_8X7B, TINY, TINY_CACHE_BYTES, as_deep_as_fits
from tests.bench.card.prompts import prompt
from tests.bench.card.report import Part, Setting
from weights.config import ModelConfig, hf_config

READS_E4M3 = (8, 9)
"""The oldest compute capability that does."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the model."""

    quantization: str | None
    kv_cache_dtype: str
    routing: str
    """even or free: what the router makes of random weights, which may send most tokens to few experts."""

    @property
    def keys(self) -> dict[str, Any]:
        """What a row says of it."""
        return {"weights": self.quantization or "unquantized", "kv_cache": self.kv_cache_dtype, "routing": self.routing}

    @property
    def simulation(self) -> str | None:
        return None if self.routing == "free" else self.routing

    def __str__(self) -> str:
        return f"weights {self.keys['weights']}, KV cache {self.kv_cache_dtype}, routing {self.routing}"


def formats(setting: Setting) -> list[tuple[str | None, str]]:
    """(quantization, dtype of the KV cache), those of 8 bits first."""
    if setting.device.type != "cuda":
        return [(None, "auto")]
    if torch.cuda.get_device_capability(setting.device) < READS_E4M3:
        return [("fp8", "auto"), (None, "auto")]  # the experts are then int8
    return [("fp8", "fp8"), ("fp8", "auto"), (None, "auto")]


def config_of(setting: Setting, part: Part, variant: Variant, num_tokens: int) -> ModelConfig | None:
    """The model that the device holds beside the keys and values of `num_tokens` tokens. With weights of 8 bits it is
    as deep as fits; as the model has them, the whole of it or None, and the part says so."""
    if setting.tiny:
        return TINY
    config = as_deep_as_fits(setting.device, num_tokens, variant.quantization, variant.kv_cache_dtype)
    if variant.quantization is None and config.num_layers < MIXTRAL_8X7B.num_layers:
        layers = f"{config.num_layers} of {MIXTRAL_8X7B.num_layers} layers"
        part.leave_out(str(variant), f"only {layers} fit beside {num_tokens} tokens")
        return None
    return config


@contextmanager
def model_folder(config: ModelConfig) -> Iterator[Path]:
    """A folder with no more than a config.json, which dummy weights need no more than."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps(hf_config(config)))
        yield Path(name)


def build(
    setting: Setting, config: ModelConfig, variant: Variant, *, max_model_len: int, max_num_seqs: int
) -> EngineCore:
    with model_folder(config) as folder:
        return EngineCore.build(
            EngineConfig(
                model=str(folder),
                device=setting.device.type,
                backend="cuda" if setting.device.type == "cuda" else "auto",
                quantization=variant.quantization,
                kv_cache_dtype=variant.kv_cache_dtype,
                routing_simulation=variant.simulation,
                load_format="dummy",
                record_routing=True,  # a rate says little without the experts that took part
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_memory_bytes=TINY_CACHE_BYTES if setting.tiny else None,
                enable_prefix_caching=False,
            )
        )


def model_row(part: Part, variant: Variant, core: EngineCore) -> None:
    """What was built, once, and its memory as it was planned and as the device tells."""
    info = core.info
    if not part.rows("models", **variant.keys):
        predicted, measured = (sum(sizes.values()) for sizes in (info.memory.predicted, info.memory.measured))
        part.row(
            "models",
            **variant.keys,
            backend=info.backend,
            dtype=info.dtype,
            num_layers=info.num_layers,
            total_params=info.total_params,
            load_seconds=info.load_seconds,
            kv_tokens=kv_tokens(core),
            predicted_bytes=predicted,
            measured_bytes=measured,
            measured_over_predicted=measured / predicted,
        )


def kv_tokens(core: EngineCore) -> int:
    """Tokens that the cache holds."""
    return core.info.num_blocks * core.info.block_size


def add(core: EngineCore, name: str, count: int, input_len: int, output_len: int) -> list[str]:
    """`count` greedy requests, whose prompts depend on `name`; their ids."""
    params = SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True)
    ids = [f"{name} {index}" for index in range(count)]
    for request_id in ids:
        prompt_ids = tuple(prompt(request_id, input_len, core.info.vocab_size))
        core.add(Request(request_id=request_id, prompt_ids=prompt_ids, params=params))
    return ids


def finish(core: EngineCore, ids: Sequence[str], *, seconds: float = float("inf")) -> tuple[int, float]:
    """Steps until all requests are done, or for so long, after which they are dropped: (tokens made, seconds)."""
    num_tokens, start = 0, time.perf_counter()
    while core.has_work:
        num_tokens += sum(new_tokens(core).values())
        if time.perf_counter() - start > seconds:
            for request_id in ids:
                core.abort(request_id)
            break
    end = time.perf_counter()
    drain(core)
    return num_tokens, end - start


def new_tokens(core: EngineCore) -> dict[str, int]:
    """One step: how many tokens each request got of it."""
    counts = {}
    for event in core.step():
        assert event.error is None, event.error
        counts[event.request_id] = len(event.token_ids)
    return counts


def drain(core: EngineCore) -> None:
    """What was dropped may still be under way."""
    while core.has_work:
        core.step()


def warm_up(core: EngineCore, longest: int) -> None:
    """Uses every kernel once that is compiled when it is first used: how contexts are cut depends on the power of two
    below them, and on how many there are. Example: a `longest` of 1000 runs contexts of 64, 128, 256, 512 and 996."""
    lengths = [1 << power for power in range(6, 20) if 1 << power < longest - 4]
    for length in [*lengths, longest - 4]:
        for count in (1, min(8, core.info.max_num_seqs)):
            if count * longest <= kv_tokens(core):
                finish(core, add(core, f"warm up {length} {count}", count, length, 4))


def free(device: torch.device) -> None:
    """Give memory back, before another model is made or another process needs it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
