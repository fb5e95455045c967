"""Part "decode": decode steps of Mixtral 8x7B beside the time that the bytes they read take at the rate of a copy."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from engine.core import EngineCore
from tests.bench.card.clock import Clock, copy_tb_per_s
from tests.bench.card.engines import (
    Variant,
    add,
    build,
    config_of,
    drain,
    finish,
    formats,
    free,
    kv_tokens,
    model_row,
    new_tokens,
    warm_up,
)
from tests.bench.card.report import BUILD_SECONDS, Part, Setting
from tests.bench.card.roofline import step_bytes


@dataclass(frozen=True, slots=True)
class Sizes:
    batches: tuple[int, ...]
    prompt_len: int
    steps: int
    """That are timed: a batch of them, all of whose sequences decode."""
    warm_steps: int
    """Before these, so that nothing is used for the first time in them."""
    max_model_len: int
    prefill_prompts: int
    prefill_len: int


# The contexts of all timed steps lie between two powers of two.
SIZES = Sizes((1, 2, 4, 8, 16, 32, 64, 128, 256), 1040, 64, 8, 2560, 16, 2048)
TINY_SIZES = Sizes((1, 3), 8, 8, 2, 64, 2, 32)
LEAST_TOKENS = 32 * 1200
"""Of the KV cache, or a model is not worth a run."""


def decode(setting: Setting, part: Part) -> None:
    """Tables: models; prefill, tokens a second of whole prompts; batches, one row a batch size."""
    sizes = TINY_SIZES if setting.tiny else SIZES
    copied = copy_tb_per_s(Clock(setting.device), setting.device)
    free(setting.device)
    part.set(copy_tb_per_s=copied)
    for quantization, kv_cache_dtype in formats(setting):
        for routing in ("even", "free"):
            variant = Variant(quantization, kv_cache_dtype, routing)
            missing = [size for size in sizes.batches if not part.rows("batches", **variant.keys, batch=size)]
            if missing and part.has_time(str(variant), seconds=BUILD_SECONDS):
                _run(setting, part, variant, sizes, missing, copied)
                free(setting.device)


def _run(setting: Setting, part: Part, variant: Variant, sizes: Sizes, batches: list[int], copied: float) -> None:
    config = config_of(setting, part, variant, LEAST_TOKENS)
    if config is None:
        return
    core = build(setting, config, variant, max_model_len=sizes.max_model_len, max_num_seqs=max(sizes.batches))
    model_row(part, variant, core)
    warm_up(core, sizes.max_model_len)
    if not part.rows("prefill", **variant.keys):
        part.row("prefill", **variant.keys, **_prefill(core, sizes))
    for batch in batches:
        name = f"{variant}, batch {batch}"
        needed = batch * _longest(core, sizes, batch)
        if needed > kv_tokens(core):
            part.leave_out(name, f"{needed} tokens of KV cache, where there are {kv_tokens(core)}")
        elif part.has_time(name):
            part.row("batches", **variant.keys, batch=batch, **_decode(core, sizes, batch, copied))


def _longest(core: EngineCore, sizes: Sizes, batch: int) -> int:
    """Tokens, in whole blocks, of the first sequence when the last steps are timed: it decodes while the others'
    prompts are computed."""
    prefill_steps = -(-batch * (sizes.prompt_len + 1) // core.info.max_num_batched_tokens)
    length = sizes.prompt_len + prefill_steps + sizes.warm_steps + sizes.steps + core.info.block_size
    return -(-length // core.info.block_size) * core.info.block_size


def _prefill(core: EngineCore, sizes: Sizes) -> dict[str, float]:
    ids = add(core, "prefill", sizes.prefill_prompts, sizes.prefill_len, 1)
    _, seconds = finish(core, ids)
    tokens = sizes.prefill_prompts * sizes.prefill_len
    return {"prompts": sizes.prefill_prompts, "tokens": sizes.prefill_len, "tok_s": tokens / seconds}


def _decode(core: EngineCore, sizes: Sizes, batch: int, copied: float) -> dict[str, Any]:
    """The timed steps of `batch` sequences. A step's time is that between what two of them return: the next may be
    under way by then."""
    ids = add(core, f"decode {batch}", batch, sizes.prompt_len, sizes.max_model_len - sizes.prompt_len)
    made = Counter(dict.fromkeys(ids, 0))
    while min(made.values()) <= sizes.warm_steps:
        assert core.has_work, "the sequences never ran all at once"
        made.update(new_tokens(core))
    before = made.total()
    start = time.perf_counter()
    marks, timed = [start], 0
    while timed < sizes.steps * batch:
        assert core.has_work, "the sequences ended too early"
        if counts := new_tokens(core):
            made.update(counts)
            timed += sum(counts.values())
            marks.append(time.perf_counter())
    seconds = marks[-1] - start
    for request_id in ids:
        core.abort(request_id)
    drain(core)

    window = core.routing_record().snapshot().window
    full = window.hits[window.tokens == batch][-sizes.steps :]  # [steps, L, E]
    assert full.shape[0] >= sizes.steps - 1, f"{full.shape[0]} steps had {batch} tokens"
    hits = float(full.sum(dim=(1, 2)).double().mean())
    context = sizes.prompt_len + (before + made.total()) / 2 / batch
    info = core.info
    read = step_bytes(
        info.memory,
        num_experts=info.num_layers * info.num_experts,
        kv_tokens=kv_tokens(core),
        hits=hits,
        positions=batch * context,
    )
    step_seconds = seconds * batch / timed
    return {
        "context": context,
        "tok_s": timed / seconds,
        "step_ms": 1e3 * step_seconds,
        "median_step_ms": 1e3 * statistics.median(later - sooner for sooner, later in pairwise(marks)),
        "distinct_experts": hits / info.num_layers,
        "expert_gb": read.experts / 1e9,
        "dense_gb": read.dense / 1e9,
        "kv_gb": read.kv_cache / 1e9,
        "gb": read.total / 1e9,
        "tb_per_s": read.total / step_seconds / 1e12,
        "copy_tb_per_s": copied,
        "percent_of_roofline": 100 * read.total / step_seconds / 1e12 / copied,
        "peak_memory_bytes": core.stats().peak_memory_bytes,
    }
