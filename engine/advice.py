"""When a model does not fit: which options would make it fit, by the plan's own arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from engine.machine import show_bytes
from engine.plan import QUANTIZATIONS, Plan, kv_cache_dtypes

_SHORTEST = 1024
"""Of the lengths and token budgets that are worth to be named."""

_STEP = 256
"""What lengths are named in multiples of."""


def what_would_fit(plan: Plan) -> str:
    """One sentence on what to change of a plan that does not fit. Every option that is named makes it fit alone; where
    none does, combinations are named that do.

    Example: "It would fit with --quantization fp8, --quantization int8 or a memory of 111.1 GB."
    """
    alone = [*_quantizations(plan), *_caches(plan), *_shorter(plan), *_smaller_steps(plan)]
    memory = f"a memory of {show_bytes(plan.required_memory_bytes, at_least=True)}"
    return f"It would fit with {_listed([*(alone or _combinations(plan)), memory])}."


def _quantizations(plan: Plan) -> Iterator[str]:
    for other in _other_quantizations(plan):
        if replace(plan, quantization=other).fits:
            yield f"--quantization {other}"


def _caches(plan: Plan) -> Iterator[str]:
    for other in _other_caches(plan):
        if replace(plan, kv_cache_dtype=other).fits:
            yield f"--kv-cache-dtype {other}"


def _shorter(plan: Plan) -> Iterator[str]:
    if (length := _longest(plan)) is not None:
        yield f"--max-model-len {length}"


def _smaller_steps(plan: Plan) -> Iterator[str]:
    tokens = plan.max_num_batched_tokens // 2
    while tokens >= min(_SHORTEST, plan.max_num_batched_tokens) // 4:
        if replace(plan, max_num_batched_tokens=tokens).fits:
            yield f"--max-num-batched-tokens {tokens}"
            return
        tokens //= 2


def _combinations(plan: Plan) -> list[str]:
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
        if flags and changed.fits:
            whole.append(" ".join(flags))
        elif flags and (length := _longest(changed)) is not None:
            shorter.append(" ".join([*flags, f"--max-model-len {length}"]))
    return whole or shorter


def _longest(plan: Plan) -> int | None:
    """The longest context below the plan's that fits, a multiple of 256; None if it is not worth naming."""
    low, high = _SHORTEST // _STEP, (plan.max_model_len - 1) // _STEP
    if high < low or not replace(plan, max_model_len=low * _STEP).fits:
        return None
    while low < high:  # low fits
        middle = (low + high + 1) // 2
        if replace(plan, max_model_len=middle * _STEP).fits:
            low = middle
        else:
            high = middle - 1
    return low * _STEP


def _other_quantizations(plan: Plan) -> list[str]:
    if plan.quantization is not None:
        return []
    return list(QUANTIZATIONS.get(plan.backend, ()))


def _other_caches(plan: Plan) -> list[str]:
    return [other for other in kv_cache_dtypes(plan.backend) if other != "auto" and other != plan.kv_cache_dtype]


def _listed(options: list[str]) -> str:
    return " or ".join([*([", ".join(options[:-1])] if len(options) > 1 else []), options[-1]])
