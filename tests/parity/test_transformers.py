"""Logits equal transformers' MixtralForCausalLM: in one go, in chunks, and token by token."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import MixtralForCausalLM

from engine.runner import Runner
from engine.upcycling import upcycle
from tests.golden_cases import GOLDEN, GoldenCase
from tests.parity.configs import VARIANTS, make
from tests.parity.paged import load_runner, paged_logits
from weights.demo import dense_gguf


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_logits_equal_transformers(variant: str, backend: str, tmp_path: Path) -> None:
    model = make(variant, tmp_path)
    ids = torch.randint(0, 101, (29,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    runner = load_runner(str(tmp_path), backend=backend)
    schedules = {"one go": [29], "chunks": [5, 11, 1, 12], "token by token": [1] * 29}
    for name, chunks in schedules.items():
        error = relative_error(paged_logits(runner, ids, chunks), expected)
        assert error < 1e-4, f"{name}: relative error {error:.2e}"
        if backend == "reference":
            break  # slow, and one schedule shows that it is the oracle


@pytest.mark.parametrize(("dtype", "backend"), [("bfloat16", "cpu"), ("bfloat16", "torch"), ("float16", "torch")])
def test_16_bit_errs_no_more_than_transformers(dtype: str, backend: str, tmp_path: Path) -> None:
    """Mean error of the logits against float32, over all variants and a long prompt: at most 1.2 times theirs."""
    ids = torch.randint(0, 101, (200,), generator=torch.Generator().manual_seed(6)).tolist()
    ours = theirs = 0.0
    for variant in VARIANTS:
        folder = tmp_path / variant
        exact = make(variant, folder)
        rounded = MixtralForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager"
        ).eval()
        with torch.inference_mode():
            expected = exact(torch.tensor([ids])).logits[0]
            scale = expected.abs().mean()
            theirs += ((rounded(torch.tensor([ids])).logits[0].float() - expected).abs().mean() / scale).item()
        actual = paged_logits(load_runner(str(folder), backend=backend, dtype=dtype), ids, [77, 123])
        ours += ((actual - expected).abs().mean() / scale).item()
    assert ours <= 1.2 * theirs, f"{ours:.4f} against {theirs:.4f}"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def noisy_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with experts that differ: noise of 0.05 times each tensor's standard deviation."""
    from server.cli import cache_dir

    folder = tmp_path_factory.mktemp("noisy") / "checkpoint"
    upcycle(str(dense_gguf(cache_dir(os.environ))), folder, num_experts=8, noise=0.05, seed=0)
    return folder


@pytest.fixture(scope="module")
def noisy_pair(noisy_demo: Path) -> tuple[Runner, MixtralForCausalLM]:
    model = MixtralForCausalLM.from_pretrained(noisy_demo, dtype=torch.float32).eval()
    return load_runner(str(noisy_demo), max_model_len=64), model


@pytest.mark.demo
@pytest.mark.parametrize("case", GOLDEN[:16:2], ids=lambda case: case.prompt[:24])
def test_noisy_demo_equals_transformers(noisy_pair: tuple[Runner, MixtralForCausalLM], case: GoldenCase) -> None:
    runner, model = noisy_pair
    ids = case.prompt_ids
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    for chunks in ([len(ids)], [3, len(ids) - 3]):
        assert relative_error(paged_logits(runner, ids, chunks), expected) < 1e-4
