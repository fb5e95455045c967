"""When a model does not fit: which options would make it fit, by the plan's own arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from engine.machine import show_bytes
from engine.plan import QUANTIZATIONS, Plan

_SHORTEST = 1024
"""Of the lengths and token budgets that are worth to be named."""

_STEP = 256
"""What lengths are named in multiples of."""

_MIB = 1 << 20


def what_would_fit(plan: Plan, *, backend: str = "auto") -> str:
    """One sentence on what to change of a plan that does not fit. Every option that is named makes it fit alone; where
    none does, combinations are named that do.

    `backend`: the server's option. Weights and caches of 8 bits are backend cuda's on a GPU, which has to be named.

    Example: "It would fit with --quantization int8, --max-model-len 4864 or a memory of 111.1 GB."
    """
    needed = "--backend cuda " if plan.backend == "cuda" and backend != "cuda" else ""
    alone = [
        *(needed + option for option in (*_quantizations(plan), *_caches(plan))),
        *_smaller_cache(plan),
        *_shorter(plan),
        *_smaller_steps(plan),
    ]
    return f"It would fit with {_listed([*(alone or _combinations(plan, needed)), _memory(plan)])}."


def _works(plan: Plan) -> bool:
    """Whether a server would start: on the CPU, the cache that it has by default must hold the longest sequence too."""
    return plan.fits and (not _has_default_cache(plan) or plan.sequence_bytes <= plan.host_cache_bytes)


def _has_default_cache(plan: Plan) -> bool:
    return plan.device == "cpu" and plan.kv_cache_memory_bytes is None


def _cache_of_a_sequence(plan: Plan) -> int:
    """Bytes, in whole blocks of any size that divides 256."""
    return -(-plan.max_model_len // _STEP) * _STEP * plan.kv_bytes_per_token


def _quantizations(plan: Plan) -> Iterator[str]:
    for other in _other_quantizations(plan):
        changed = replace(plan, quantization=other)
        if _works(changed):
            yield f"--quantization {other}"
        elif _has_default_cache(plan):
            size = _cache_of_a_sequence(plan)
            if replace(changed, kv_cache_memory_bytes=size).fits:
                yield f"--quantization {other} --kv-cache-memory-bytes {size}"


def _caches(plan: Plan) -> Iterator[str]:
    for other in _other_caches(plan):
        if _works(replace(plan, kv_cache_dtype=other)):
            yield f"--kv-cache-dtype {other}"


def _smaller_cache(plan: Plan) -> Iterator[str]:
    """The largest that fits, in MiB, where the size of one was chosen."""
    if plan.kv_cache_memory_bytes is not None:
        size = (plan.budget_bytes - plan.fixed_bytes) // _MIB
        if size >= 1 and replace(plan, kv_cache_memory_bytes=size * _MIB).fits:
            yield f"--kv-cache-memory-bytes {size}MiB"


def _shorter(plan: Plan) -> Iterator[str]:
    if (length := _longest(plan)) is not None:
        yield f"--max-model-len {length}"


def _smaller_steps(plan: Plan) -> Iterator[str]:
    tokens = plan.max_num_batched_tokens // 2
    while tokens >= max(1, min(_SHORTEST, plan.max_num_batched_tokens) // 4):
        if _works(replace(plan, step_tokens=tokens)):
            yield f"--max-num-batched-tokens {tokens}"
            return
        tokens //= 2


def _memory(plan: Plan) -> str:
    """The smallest memory that is enough, others holding as much of it as now; with a size of the cache where no memory
    would give it one by default.
    """
    if not _has_default_cache(plan):
        return f"a memory of {show_bytes(plan.required_memory_bytes, at_least=True)}"
    least = plan.memory_bytes - plan.free_bytes + plan.weight_bytes + 4 * plan.sequence_bytes
    enough = max(least, plan.required_memory_bytes)
    if _works(replace(plan, memory_bytes=enough, free_bytes=enough - plan.memory_bytes + plan.free_bytes)):
        return f"a memory of {show_bytes(enough, at_least=True)}"
    size = _cache_of_a_sequence(plan)
    enough = replace(plan, kv_cache_memory_bytes=size).required_memory_bytes
    return f"--kv-cache-memory-bytes {size} and a memory of {show_bytes(enough, at_least=True)}"


def _combinations(plan: Plan, needed: str) -> list[str]:
    """Weights and cache together; where even that does not fit, each with the longest context that does."""
    quantizations = [*_other_quantizations(plan), plan.quantization]
    caches = [plan.kv_cache_dtype, *_other_caches(plan)]
    whole, shorter = [], []
    for quantization, cache in product(quantizations, caches):
        changed = replace(plan, quantization=quantization, kv_cache_dtype=cache)
        flags = []
        if quantization != plan.quantization:
            flags.append(f"--quantization {quantization}")
        if cache != plan.kv_cache_dtype:
            flags.append(f"--kv-cache-dtype {cache}")
        if flags and _works(changed):
            whole.append(needed + " ".join(flags))
        elif flags and (length := _longest(changed)) is not None:
            shorter.append(needed + " ".join([*flags, f"--max-model-len {length}"]))
    return whole or shorter


def _longest(plan: Plan) -> int | None:
    """The longest context below the plan's that fits, a multiple of 256; None if it is not worth naming."""
    low, high = _SHORTEST // _STEP, (plan.max_model_len - 1) // _STEP
    if high < low or not _works(replace(plan, max_model_len=low * _STEP)):
        return None
    while low < high:  # low fits
        middle = (low + high + 1) // 2
        if _works(replace(plan, max_model_len=middle * _STEP)):
            low = middle
        else:
            high = middle - 1
    return low * _STEP


def _other_quantizations(plan: Plan) -> list[str]:
    if plan.quantization is not None:
        return []
    return list(QUANTIZATIONS.get(plan.backend, ()))


def _other_caches(plan: Plan) -> list[str]:
    return [other for other in plan.kv_cache_dtypes if other not in ("auto", plan.kv_cache_dtype)]


def _listed(options: list[str]) -> str:
    return " or ".join([*([", ".join(options[:-1])] if len(options) > 1 else []), options[-1]])
