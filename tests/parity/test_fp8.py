"""Logits of a float8 checkpoint equal those of transformers' Mixtral with the weights that it stands for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralForCausalLM

from tests.parity.paged import load_runner, paged_logits
from tests.parity.test_transformers import relative_error
from tests.tiny import TINY_MIXTRAL
from tests.tiny_fp8 import AUTOFP8, COMPRESSED_TENSORS, dequantized, write_tiny_fp8
from weights.config import hf_config


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
@pytest.mark.parametrize(
    ("layout", "per_channel"), [(COMPRESSED_TENSORS, True), (AUTOFP8, False)], ids=["channel", "tensor"]
)
def test_logits_equal_transformers(tmp_path: Path, layout: dict[str, Any], per_channel: bool, backend: str) -> None:
    config = replace(TINY_MIXTRAL, dtype="bfloat16", num_heads=3, num_kv_heads=1, num_experts=5)
    fp8, wide = tmp_path / "fp8", tmp_path / "wide"
    tensors = write_tiny_fp8(fp8, config, layout=layout, per_channel=per_channel)
    wide.mkdir()
    save_file(dequantized(tensors), wide / "model.safetensors", metadata={"format": "pt"})
    (wide / "config.json").write_text(json.dumps(hf_config(config)))
    model = MixtralForCausalLM.from_pretrained(
        wide, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    ids = torch.randint(0, config.vocab_size, (29,), generator=torch.Generator().manual_seed(5)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    error = relative_error(paged_logits(load_runner(str(fp8), backend=backend), ids, [5, 11, 1, 12]), expected)
    assert error < 1e-4, f"relative error {error:.2e}"
