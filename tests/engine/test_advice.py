"""What is named as an option when a model does not fit does make it fit, and nothing that would is left out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.advice import what_would_fit
from engine.machine import parse_memory
from engine.plan import Plan, plan_model
from tests.engine.test_plan import MIXTRAL_8X7B, TINY
from weights.config import ModelConfig

FIELDS = {
    "--quantization": "quantization",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--max-model-len": "max_model_len",
    "--max-num-batched-tokens": "step_tokens",
    "--kv-cache-memory-bytes": "kv_cache_memory_bytes",
}


def options(plan: Plan) -> list[dict[str, object]]:
    """What the sentence names, as fields of a plan."""
    sentence = what_would_fit(plan)
    assert re.fullmatch(r"It would fit with [^.]+(\.\d+)?[^.]*\.", sentence), sentence
    parts = re.split(r", | or ", sentence.removeprefix("It would fit with ").removesuffix("."))
    found: list[dict[str, object]] = []
    for part in parts:
        rest, _, memory = part.partition("a memory of ")
        words = rest.removesuffix("and ").removeprefix("--backend cuda ").split()
        assert part.startswith("--backend cuda ") is (plan.backend == "cuda" and part.startswith(NARROWER))
        pairs = zip(words[::2], words[1::2], strict=True)
        changes: dict[str, object] = {FIELDS[flag]: number(value) for flag, value in pairs}
        if memory:
            changes["memory_bytes"] = enough = parse_memory(memory.replace(",", ""))
            changes["free_bytes"] = enough - (plan.memory_bytes - plan.free_bytes)
        found.append(changes)
    return found


NARROWER = ("--backend cuda --quantization", "--backend cuda --kv-cache-dtype", "--quantization", "--kv-cache-dtype")


def number(text: str) -> int | str:
    return parse_memory(text) if text[0].isdecimal() else text


def starts(plan: Plan) -> bool:
    """As a server does: it has no more than 4 GiB of cache on a CPU unless told, and no more than a quarter of what is
    free there beside the weights."""
    if plan.device == "cpu" and plan.kv_cache_memory_bytes is None:
        cache = min(4 << 30, (plan.free_bytes - plan.weight_bytes) // 4)
        return plan.fits and plan.max_model_len * plan.kv_bytes_per_token <= cache
    return plan.fits


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from(
        [
            MIXTRAL_8X7B,
            replace(MIXTRAL_8X7B, max_position_embeddings=100_000),
            TINY,
            replace(TINY, max_position_embeddings=200_000),
        ]
    ),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.floats(0.3, 0.999),
    st.booleans(),
    st.sampled_from([None, 1, 2, 3, 4, 5000]),
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_every_option_that_is_named_makes_it_fit(
    config: ModelConfig, device: str, dtype: str, share: float, fp8: bool, steps: int | None, held: float
) -> None:
    quantization, cache = ("fp8", "fp8") if fp8 and device == "cuda" else (None, "auto")
    plan = plan_model(
        config,
        device=device,
        dtype=dtype,
        quantization=quantization,
        kv_cache_dtype=cache,
        memory_bytes=1,
        max_num_batched_tokens=steps,
    )
    memory = int(plan.required_memory_bytes * share)
    plan = replace(plan, memory_bytes=memory, free_bytes=int(memory * (1 - held)))
    assert not plan.fits
    named = options(plan)
    assert "memory_bytes" in named[-1]
    for changes in named:
        assert changes
        assert starts(replace(plan, **changes)), changes  # type: ignore[arg-type]
        assert changes.get("step_tokens", 1) != 0


@pytest.mark.parametrize(
    ("memory", "quantization", "sentence"),
    [
        (
            "80GiB",
            None,
            "--backend cuda --quantization fp8, --backend cuda --quantization int8 or a memory of 111.1 GB.",
        ),
        ("59GB", "fp8", "--backend cuda --kv-cache-dtype fp8, --max-model-len 20736 or a memory of 60.8 GB."),
        ("57GB", "fp8", "--max-model-len 7168 or a memory of 60.8 GB."),
        ("40GB", "fp8", "a memory of 60.8 GB."),
        ("60GB", None, "--backend cuda --quantization int8 or a memory of 111.1 GB."),
        ("58GB", None, "--backend cuda --quantization int8 --kv-cache-dtype fp8 or a memory of 111.1 GB."),
        (
            "57GB",
            None,
            "--backend cuda --quantization fp8 --max-model-len 7168, "
            "--backend cuda --quantization fp8 --kv-cache-dtype fp8 --max-model-len 14336, "
            "--backend cuda --quantization int8 --max-model-len 12544, "
            "--backend cuda --quantization int8 --kv-cache-dtype fp8 --max-model-len 25088 "
            "or a memory of 111.1 GB.",
        ),
    ],
)
def test_what_is_said_of_mixtral_8x7b(memory: str, quantization: str | None, sentence: str) -> None:
    plan = plan_model(MIXTRAL_8X7B, quantization=quantization, memory_bytes=parse_memory(memory))
    assert what_would_fit(plan) == f"It would fit with {sentence}"
    assert what_would_fit(plan, backend="cuda") == f"It would fit with {sentence}".replace("--backend cuda ", "")


def test_the_longest_context_that_is_named_is_the_longest() -> None:
    plan = plan_model(MIXTRAL_8X7B, quantization="fp8", memory_bytes=parse_memory("57GB"))
    assert replace(plan, max_model_len=7168).fits
    assert not replace(plan, max_model_len=7168 + 256).fits


def test_a_smaller_step_is_named_where_it_helps() -> None:
    plan = plan_model(MIXTRAL_8X7B, max_model_len=1024, memory_bytes=1)
    tight = replace(plan, memory_bytes=plan.required_memory_bytes - 10**8)
    assert {"step_tokens": 1024} in options(tight)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
def test_no_step_of_no_tokens_is_named(tokens: int) -> None:
    """Nor looked for without an end."""
    plan = plan_model(MIXTRAL_8X7B, max_num_batched_tokens=tokens, memory_bytes=1)
    assert "--max-num-batched-tokens" not in what_would_fit(plan)


def test_a_cache_of_fp8_is_not_named_where_the_card_has_none() -> None:
    """A card before compute capability 8.9 takes int8 for fp8 weights, and no other cache."""
    plan = plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("57GB"), has_fp8_kv_cache=False)
    assert "--kv-cache-dtype" not in what_would_fit(plan)
    assert "--quantization int8 --max-model-len 12544" in what_would_fit(plan)


@pytest.mark.parametrize(
    ("memory", "context", "sentence"),
    [
        ("64GiB", 32768, "--quantization int8 or a memory of 110.6 GB."),
        ("64GiB", 16384, "--quantization int8 or a memory of 106.5 GB."),
        (
            "64GiB",
            40_000,
            "--quantization int8 --kv-cache-memory-bytes 5268045824 or "
            "--kv-cache-memory-bytes 5268045824 and a memory of 110.0 GB.",
        ),
    ],
)
def test_what_is_said_of_mixtral_8x7b_on_a_cpu(memory: str, context: int, sentence: str) -> None:
    """Which has 4 GiB of cache, 32,768 tokens, unless told otherwise."""
    config = replace(MIXTRAL_8X7B, max_position_embeddings=context)
    plan = plan_model(config, device="cpu", memory_bytes=parse_memory(memory))
    assert what_would_fit(plan) == f"It would fit with {sentence}"
