from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY_MIXTRAL
from weights import dummy
from weights.families import family_of
from weights.params import Piece

CONFIG = replace(TINY_MIXTRAL, num_heads=3, num_kv_heads=1, num_experts=5, vocab_size=77)


class Recorder:
    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        assert tuple(tensor.shape) == piece.shape
        assert scale is None
        self.tensors[piece.source] = tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_piece_is_drawn(dtype: torch.dtype) -> None:
    sink = Recorder()
    report = dummy.load(CONFIG, sink, device="cpu", dtype=dtype, seed=1)
    assert list(sink.tensors) == [piece.source for piece in family_of(CONFIG).pieces(CONFIG)]
    assert report.num_bytes == sum(tensor.nbytes for tensor in sink.tensors.values())
    for name, tensor in sink.tensors.items():
        assert tensor.dtype == dtype
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor))
        elif tensor.numel() > 500:
            assert tensor.float().std().item() == pytest.approx(0.02, rel=0.15)
            assert abs(tensor.float().mean().item()) < 0.003


def test_the_seed_decides() -> None:
    first, same, other = Recorder(), Recorder(), Recorder()
    for sink, seed in ((first, 1), (same, 1), (other, 2)):
        dummy.load(CONFIG, sink, device="cpu", dtype=torch.float32, seed=seed)
    name = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    assert torch.equal(first.tensors[name], same.tensors[name])
    assert not torch.equal(first.tensors[name], other.tensors[name])
    assert not torch.equal(first.tensors[name], first.tensors[name.replace("experts.4", "experts.3")])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_are_made_on_the_device_itself() -> None:
    sink = Recorder()
    dummy.load(CONFIG, sink, device="cuda", dtype=torch.bfloat16, seed=0)
    assert all(tensor.is_cuda for tensor in sink.tensors.values())
