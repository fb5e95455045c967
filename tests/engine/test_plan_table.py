"""Plans as people read them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.machine import parse_memory
from engine.plan import plan_model
from engine.plan_table import comparison, table, variants
from tests.engine.test_plan import KV_TOKENS, MIXTRAL_8X7B


def test_table_says_what_fits_and_what_would() -> None:
    fits = table(plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("141GB")))
    assert "46,702,792,704" in fits
    assert "12,879,925,248" in fits
    assert "93.4 GB" in fits
    assert fits.splitlines()[-1].startswith("Fits: ")
    short = table(plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("80GiB")))
    assert short.splitlines()[-1].startswith("Does not fit: ")
    assert "It would fit with --backend cuda --quantization fp8" in short
    assert all(line == line.rstrip() for line in fits.splitlines())


def test_the_parts_of_the_memory_add_up() -> None:
    plan = plan_model(MIXTRAL_8X7B, quantization="fp8", memory_bytes=parse_memory("80GiB"))
    lines = table(plan).splitlines()
    (start,) = [index for index, line in enumerate(lines) if line.startswith("to use (90%)")]
    sizes = [parse_memory("".join(line.split()[-2:])) for line in lines[start : start + 6]]
    assert sizes[0] == pytest.approx(sum(sizes[1:]), abs=0.3e9)
    assert [line.split("  ")[1].strip() for line in lines[start + 1 : start + 6]] == [
        "weights",
        "activations (2,048 tokens a step)",
        "CUDA graphs",
        "CUDA itself",
        "KV cache",
    ]
    assert "CUDA" not in table(plan_model(MIXTRAL_8X7B, device="cpu", memory_bytes=parse_memory("80GiB")))


def test_a_share_with_decimals_is_shown_with_them() -> None:
    plan = plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory("141GB"), gpu_memory_utilization=0.925)
    assert "to use (92.5%)" in table(plan)
    assert "to use (29%)" in table(replace(plan, gpu_memory_utilization=0.29))


@pytest.mark.parametrize("memory", ["80GiB", "141GB"])
def test_the_comparison_has_a_line_for_each_kind_of_weights_and_cache(memory: str) -> None:
    plans = variants(plan_model(MIXTRAL_8X7B, memory_bytes=parse_memory(memory)))
    lines = comparison(plans).splitlines()[1:]
    wanted = {key[1:]: tokens for key, tokens in KV_TOKENS.items() if key[0] == memory}
    assert len(lines) == len(plans) == len(wanted) == 6
    for line, ((quantization, cache), tokens) in zip(lines, wanted.items(), strict=True):
        words = line.split()
        assert words[:2] == [quantization or "bfloat16", "fp8" if cache == "fp8" else "bfloat16"]
        assert words[4:6] == [f"{tokens:,}", f"{tokens // 4096:,}"]
        assert line.endswith("does not fit") is (tokens < 32768)


def test_a_checkpoint_of_fp8_is_not_compared_with_what_it_is_not() -> None:
    config = replace(MIXTRAL_8X7B, fp8=True, fp8_experts=True)
    kinds = [plan.quantization for plan in variants(plan_model(config, memory_bytes=1))]
    assert kinds == ["fp8", "fp8", "int8", "int8"]


def test_each_kind_of_weights_has_its_own_token_budget_unless_one_was_asked_for() -> None:
    """On an H100 int8 weights turn compute-bound at half the tokens."""
    plan = plan_model(MIXTRAL_8X7B, card="NVIDIA H100 80GB HBM3", memory_bytes=parse_memory("80GiB"))
    plans = variants(plan)
    assert [each.max_num_batched_tokens for each in plans] == [1152, 1152, 1152, 1152, 640, 640]
    for each in plans:
        assert each.activation_bytes == replace(each, step_tokens=each.max_num_batched_tokens).activation_bytes
    assert {each.max_num_batched_tokens for each in variants(replace(plan, step_tokens=77))} == {77}


def test_the_cpu_has_its_own_kinds() -> None:
    plans = variants(plan_model(MIXTRAL_8X7B, device="cpu", memory_bytes=10**9))
    assert [(plan.quantization, plan.kv_cache_dtype) for plan in plans] == [(None, "auto"), ("int8", "auto")]


def test_the_readme_has_these_figures() -> None:
    lines = (Path(__file__).parent.parent.parent / "README.md").read_text().splitlines()
    for quantization, cache in {key[1:] for key in KV_TOKENS}:
        names = f"| {quantization or 'bfloat16'} | {'fp8' if cache == 'fp8' else 'bfloat16'} |"
        (line,) = [line for line in lines if line.startswith(names)]
        for memory in ("80GiB", "141GB"):
            tokens = KV_TOKENS[memory, quantization, cache]
            assert f" {tokens:,} | {tokens // 4096} |" in line if tokens else "do not fit" in line
