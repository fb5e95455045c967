"""Plans for people: where the memory of one goes, and several beside each other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engine.advice import what_would_fit
from engine.machine import show_bytes
from engine.plan import BATCH_CONTEXT, QUANTIZATIONS, MemoryKind, Plan, held_quantization


def table(plan: Plan) -> str:
    """Parameters by kind, then how they share the memory, then the verdict."""
    sizes = plan.weight_bytes_by_kind
    lines = [f"{'':<24}{'parameters':>16}{plan.quantization or plan.dtype:>14}"]
    lines += [f"{kind.value:<24}{count:>16,}{show_bytes(sizes[kind]):>14}" for kind, count in plan.params.items()]
    lines += [
        f"{'total':<24}{plan.total_params:>16,}{show_bytes(plan.weight_bytes):>14}",
        f"{'active for a token':<24}{plan.active_params:>16,}{show_bytes(plan.active_bytes):>14}",
        "",
        _line("memory", plan.memory_bytes),
        _line(f"to use ({plan.gpu_memory_utilization * 100:g}%)", plan.budget_bytes),
        *_parts(plan),
        _line("headroom", plan.memory_bytes - plan.budget_bytes),
        "",
        f"{'KV cache a token':<40}{f'{plan.kv_bytes_per_token:,} B':>14}",
        f"{'KV cache holds':<40}{f'{plan.max_kv_tokens:,} tok':>14}",
        f"{f'sequences of {BATCH_CONTEXT:,} tokens':<40}{plan.max_batch:>14,}",
        "",
        verdict(plan),
    ]
    return "\n".join(lines)


def _parts(plan: Plan) -> Iterator[str]:
    """A line for each kind of memory; the CPU has no graphs and nothing of its own."""
    for kind, size in plan.parts.items():
        steps = f" ({plan.max_num_batched_tokens:,} tokens a step)" if kind is MemoryKind.ACTIVATIONS else ""
        if size or kind not in (MemoryKind.GRAPHS, MemoryKind.RUNTIME):
            yield _line(f"  {kind}{steps}", size)


def verdict(plan: Plan) -> str:
    """Whether it fits, in a sentence or two."""
    need = f"one sequence of {plan.max_model_len:,} tokens needs {show_bytes(plan.required_bytes)}"
    if plan.fits:
        return f"Fits: {need} of the {show_bytes(plan.budget_bytes)} to use."
    return f"Does not fit: {need}, there are {show_bytes(plan.budget_bytes)} to use. {what_would_fit(plan)}"


def variants(plan: Plan) -> list[Plan]:
    """`plan` with every kind of weights and of KV cache that its backend has, given what the checkpoint has. A token
    budget that was not asked for is each one's own.
    """
    unchanged = held_quantization(plan.backend, plan.config, None)
    kinds = dict.fromkeys((unchanged, *QUANTIZATIONS.get(plan.backend, ())))
    return [
        replace(plan, quantization=quantization, kv_cache_dtype=kv_cache_dtype)
        for quantization in kinds
        for kv_cache_dtype in plan.kv_cache_dtypes
    ]


def comparison(plans: list[Plan]) -> str:
    """A line for each of the plans, which differ in weights and KV cache alone."""
    head = f"sequences of {BATCH_CONTEXT:,}"
    longest = f"one of {plans[0].max_model_len:,}"
    lines = [f"{'weights':<10}{'KV cache':<10}{'weights':>12}{'KV tokens':>14}{head:>20}  {longest}"]
    for plan in plans:
        names = f"{plan.quantization or plan.dtype:<10}{'fp8' if plan.kv_cache_dtype == 'fp8' else plan.dtype:<10}"
        figures = f"{show_bytes(plan.weight_bytes):>12}{plan.max_kv_tokens:>14,}{plan.max_batch:>20,}"
        lines.append(f"{names}{figures}  {'fits' if plan.fits else 'does not fit'}")
    return "\n".join(lines)


def _line(name: str, num_bytes: int) -> str:
    return f"{name:<40}{show_bytes(num_bytes):>14}"
