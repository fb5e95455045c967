"""Part "shapes": throughput offline, at the lengths of prompts and answers that TensorRT-LLM publishes its own for.

All requests are there from the start, as many run at once as the cache holds and the engine takes, and the time is that
from the first to the last. Their numbers are those of `SHAPES`; a shape that would take longer than `SHARE_SECONDS` by
the rates that the engine had just before has fewer, which its row says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.core import EngineCore
from tests.bench.card.engines import (
    Variant,
    add,
    build,
    config_of,
    finish,
    formats,
    free,
    kv_tokens,
    model_row,
    warm_up,
)
from tests.bench.card.report import BUILD_SECONDS, PART_SECONDS, Part, Setting


@dataclass(frozen=True, slots=True)
class Shape:
    input_len: int
    output_len: int
    requests: int


SHAPES = (
    Shape(128, 128, 2048),
    Shape(128, 2048, 384),
    Shape(1000, 1000, 512),
    Shape(2048, 128, 512),
    Shape(2048, 2048, 256),
    Shape(5000, 500, 128),
)
TINY_SHAPES = (Shape(8, 8, 6), Shape(24, 4, 5))
SHARE_SECONDS = PART_SECONDS / 8
"""Of a shape: an eighth of the part, so that six of them leave time to build the model."""
MAX_NUM_SEQS, TINY_NUM_SEQS = 512, 4
LEAST_TOKENS = 64 * 2000
"""Of the KV cache, or a model is not worth a run."""
GOALS = {("fp8", "fp8", 1000, 1000): 6869.0}
"""Output tokens a second of TensorRT-LLM 0.17 on an H100, as published, by weights, KV cache and lengths."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of the engine, as full as may be."""

    prefill: float
    decode: float

    def seconds(self, shape: Shape) -> float:
        """That all requests of `shape` will take, about: contexts longer than where the rates are from take more."""
        return shape.requests * (shape.input_len / self.prefill + shape.output_len / self.decode)


def shapes(setting: Setting, part: Part) -> None:
    """Tables: models; rates; shapes, a row each."""
    for quantization, kv_cache_dtype in formats(setting):
        if (quantization is None) != (kv_cache_dtype == "auto"):
            continue  # 8 bits of both, or of neither
        variant = Variant(quantization, kv_cache_dtype, "even")  # every expert is read in every step
        missing = [shape for shape in (TINY_SHAPES if setting.tiny else SHAPES) if not _done(part, variant, shape)]
        if missing and part.has_time(str(variant), seconds=BUILD_SECONDS):
            _run(setting, part, variant, missing)
            free(setting.device)


def _keys(variant: Variant, shape: Shape) -> dict[str, Any]:
    return {**variant.keys, "input_len": shape.input_len, "output_len": shape.output_len}


def _done(part: Part, variant: Variant, shape: Shape) -> bool:
    return bool(part.rows("shapes", **_keys(variant, shape)))


def _run(setting: Setting, part: Part, variant: Variant, missing: list[Shape]) -> None:
    config = config_of(setting, part, variant, LEAST_TOKENS)
    if config is None:
        return
    longest = max(shape.input_len + shape.output_len for shape in missing)
    core = build(
        setting,
        config,
        variant,
        max_model_len=longest,
        max_num_seqs=TINY_NUM_SEQS if setting.tiny else MAX_NUM_SEQS,
    )
    model_row(part, variant, core)
    warm_up(core, longest)
    rates = _rates(core, missing[0].input_len)
    part.row("rates", **variant.keys, prefill_tok_s=rates.prefill, decode_tok_s=rates.decode)
    for shape in missing:
        if part.has_time(f"{variant}, {shape.input_len}/{shape.output_len}"):
            found = _measure(core, variant, shape, rates, min(2 * SHARE_SECONDS, part.most_seconds))
            part.row("shapes", **_keys(variant, shape), **found)


def _rates(core: EngineCore, input_len: int) -> Rates:
    """Of as many prompts as run at once, for one token of each and for 33. The first time is to warm up."""
    output_len = 33
    count = min(core.info.max_num_seqs, max(1, kv_tokens(core) // (input_len + output_len + core.info.block_size)))
    times = [
        finish(core, add(core, f"rates {number} {length}", count, input_len, length))[1]
        for number in range(2)
        for length in (1, output_len)
    ]
    first, whole = times[2:]
    # Of a tiny model on a busy machine, the longer run may be the faster one.
    return Rates(count * input_len / first, count * (output_len - 1) / max(whole - first, 1e-3))


def _measure(core: EngineCore, variant: Variant, shape: Shape, rates: Rates, most_seconds: float) -> dict[str, Any]:
    """What is left of the shape after `most_seconds` is dropped."""
    requests = requests_in(SHARE_SECONDS, shape, rates)
    preempted = core.stats().num_preemptions
    core.reset_experts()
    ids = add(core, f"{shape.input_len}/{shape.output_len}", requests, shape.input_len, shape.output_len)
    num_tokens, seconds = finish(core, ids, seconds=most_seconds)
    layers = core.expert_report().total.layers
    row = {
        "requests": requests,
        "requests_planned": shape.requests,
        "all_answered": num_tokens == requests * shape.output_len,
        "seconds": seconds,
        "output_tok_s": num_tokens / seconds,
        # Prompts count when they are answered: those of a run that was dropped do so in part.
        "total_tok_s": num_tokens * (1 + shape.input_len / shape.output_len) / seconds,
        "distinct_experts": sum(layer.distinct_experts for layer in layers) / len(layers),
        "preemptions": core.stats().num_preemptions - preempted,
        "peak_memory_bytes": core.stats().peak_memory_bytes,
    }
    goal = GOALS.get((variant.keys["weights"], variant.kv_cache_dtype, shape.input_len, shape.output_len))
    return (
        row if goal is None else row | {"trt_llm_0_17_h100": goal, "percent_of_it": 100 * num_tokens / seconds / goal}
    )


def requests_in(seconds: float, shape: Shape, rates: Rates) -> int:
    """Of the requests of `shape`, those for which there is time; at least one."""
    share = min(1.0, seconds / rates.seconds(shape))
    return max(1, int(shape.requests * share))
