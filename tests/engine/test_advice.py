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
    "--max-num-batched-tokens": "max_num_batched_tokens",
}


def options(plan: Plan) -> list[dict[str, object]]:
    """What the sentence names, as fields of a plan."""
    sentence = what_would_fit(plan)
    assert re.fullmatch(r"It would fit with [^.]+(\.\d+)?[^.]*\.", sentence), sentence
    parts = re.split(r", | or ", sentence.removeprefix("It would fit with ").removesuffix("."))
    found: list[dict[str, object]] = []
    for part in parts:
        if part.startswith("a memory of "):
            found.append({"memory_bytes": parse_memory(part.removeprefix("a memory of ").replace(",", ""))})
        else:
            words = part.split()
            pairs = zip(words[::2], words[1::2], strict=True)
            found.append({FIELDS[flag]: int(value) if value.isdecimal() else value for flag, value in pairs})
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from([MIXTRAL_8X7B, TINY, replace(TINY, max_position_embeddings=200_000)]),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from(["float32", "float16", "bfloat16"]),
    st.floats(0.3, 0.999),
    st.booleans(),
)
def test_every_option_that_is_named_makes_it_fit(
    config: ModelConfig, device: str, dtype: str, share: float, fp8: bool
) -> None:
    quantization, cache = ("fp8", "fp8") if fp8 and device == "cuda" else (None, "auto")
    plan = plan_model(
        config, device=device, dtype=dtype, quantization=quantization, kv_cache_dtype=cache, memory_bytes=1
    )
    plan = replace(plan, memory_bytes=int(plan.required_memory_bytes * share))
    assert not plan.fits
    named = options(plan)
    assert "memory_bytes" in named[-1]
    for changes in named:
        assert changes
        assert replace(plan, **changes).fits, changes  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("memory", "quantization", "sentence"),
    [
        ("80GiB", None, "--quantization fp8, --quantization int8 or a memory of 111.1 GB."),
        ("59GB", "fp8", "--kv-cache-dtype fp8, --max-model-len 20736 or a memory of 60.8 GB."),
        ("57GB", "fp8", "--max-model-len 7168 or a memory of 60.8 GB."),
        ("40GB", "fp8", "a memory of 60.8 GB."),
        ("60GB", None, "--quantization int8 or a memory of 111.1 GB."),
        ("58GB", None, "--quantization int8 --kv-cache-dtype fp8 or a memory of 111.1 GB."),
        (
            "57GB",
            None,
            "--quantization fp8 --max-model-len 7168, --quantization fp8 --kv-cache-dtype fp8 --max-model-len 14336, "
            "--quantization int8 --max-model-len 12544, --quantization int8 --kv-cache-dtype fp8 --max-model-len 25088 "
            "or a memory of 111.1 GB.",
        ),
    ],
)
def test_what_is_said_of_mixtral_8x7b(memory: str, quantization: str | None, sentence: str) -> None:
    plan = plan_model(MIXTRAL_8X7B, quantization=quantization, memory_bytes=parse_memory(memory))
    assert what_would_fit(plan) == f"It would fit with {sentence}"


def test_the_longest_context_that_is_named_is_the_longest() -> None:
    plan = plan_model(MIXTRAL_8X7B, quantization="fp8", memory_bytes=parse_memory("57GB"))
    assert replace(plan, max_model_len=7168).fits
    assert not replace(plan, max_model_len=7168 + 256).fits


def test_a_smaller_step_is_named_where_it_helps() -> None:
    plan = plan_model(MIXTRAL_8X7B, max_model_len=1024, memory_bytes=1)
    tight = replace(plan, memory_bytes=plan.required_memory_bytes - 10**8)
    assert {"max_num_batched_tokens": 1024} in options(tight)
