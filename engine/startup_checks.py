"""A start's plan: what cannot be is said before anything is loaded; and what it said of what was then measured."""

from __future__ import annotations

from collections.abc import Iterable

from engine.advice import what_would_fit
from engine.errors import ConfigurationError
from engine.machine import show_bytes
from engine.memory import num_kv_blocks
from engine.plan import MemoryKind, Plan
from engine.sizes import kv_bytes_per_token


def check_memory(plan: Plan, *, block_size: int, could_narrow: bool) -> None:
    """Where weights and KV cache cannot fit, the start ends here, rather than in an allocation that fails late or in a
    machine that swaps. What steps take is measured later. Raises ConfigurationError.

    A cache whose size was chosen has to hold the longest sequence and to fit beside the weights; on a GPU, one that
    gets what is left has to hold that sequence; on the CPU, so has the one that it gets by default.
    """
    if plan.kv_cache_memory_bytes is not None:
        num_blocks_in(plan.kv_cache_memory_bytes, plan, block_size=block_size, could_narrow=could_narrow)
    least = plan.weight_bytes
    needs = [f"the weights take {show_bytes(least)} in {plan.quantization or plan.dtype}"]
    if plan.kv_cache_memory_bytes is not None:
        needs.append(f"kv_cache_memory_bytes {show_bytes(plan.kv_cache_memory_bytes)}")
        least += plan.kv_cache_memory_bytes
    elif plan.device == "cuda":
        needs.append(f"one sequence of {plan.max_model_len:,} tokens {show_bytes(plan.sequence_bytes)}")
        least += plan.sequence_bytes
    if least > plan.budget_bytes:
        raise ConfigurationError(
            f"{', '.join(needs)}; this device has {show_bytes(plan.memory_bytes)} and may use "
            f"{plan.gpu_memory_utilization * 100:g}% of it. {what_would_fit(plan, backend=plan.backend)}"
        )
    if plan.kv_cache_memory_bytes is None and plan.device == "cpu":
        num_blocks_in(plan.host_cache_bytes, plan, block_size=block_size, could_narrow=could_narrow)


def num_blocks_in(num_bytes: int, plan: Plan, *, block_size: int, could_narrow: bool) -> int:
    """Whole blocks of a KV cache of `num_bytes`, for sequences as the plan has them. Raises ConfigurationError as
    `num_kv_blocks` does. `could_narrow`: the cache might be fp8, and is not.
    """
    return num_kv_blocks(
        num_bytes,
        bytes_per_token=plan.kv_bytes_per_token,
        fp8_bytes_per_token=kv_bytes_per_token(plan.config, plan.dtype, "fp8") if could_narrow else None,
        block_size=block_size,
        max_model_len=plan.max_model_len,
    )


def predicted(plan: Plan, *, num_tokens: int, kinds: Iterable[MemoryKind]) -> dict[str, int]:
    """What was planned of the `kinds` that were measured. A cache that does not get what is left, for somebody chose
    its size or it is the CPU's, is that of its `num_tokens`."""
    planned = plan.parts
    if plan.kv_cache_memory_bytes is not None or plan.device == "cpu":
        planned[MemoryKind.KV_CACHE] = num_tokens * plan.kv_bytes_per_token
    return {str(kind): planned[kind] for kind in kinds}
