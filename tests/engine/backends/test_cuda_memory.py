"""What a step of the GPU's backend takes at the sizes of Mixtral 8x7B, as engine/activations.py computes it, against
the tensors that it makes: they have sizes, and no contents.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.activations import StepSize, activation_bytes, graph_bytes
from engine.backends.cuda.backend import CudaBackend
from engine.backends.cuda.launch import Launch
from engine.models.registry import build_model
from engine.plan import plan_model
from engine.routing.select import make_router
from tests.engine.backends.test_cuda_step import H100, META, without_contents
from tests.engine.test_plan import MIXTRAL_8X7B
from weights.families import family_of

E4M3 = torch.float8_e4m3fn
QUANTIZATIONS = {None: None, "fp8": E4M3, "int8": torch.int8}


class PeakOfTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that live, meta tensors too, which have a size and no memory."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak: int = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {arg.untyped_storage()._cdata for arg in tree_leaves((args, kwargs)) if isinstance(arg, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._live = {key: entry for key, entry in self._live.items() if not _is_gone(entry[0])}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._live and storage._cdata not in before:
                    self._live[storage._cdata] = _reference(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


def _reference(storage: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(storage)  # type: ignore[no-untyped-call]


def _is_gone(reference: StorageWeakRef) -> bool:
    gone: bool = reference.expired()  # type: ignore[no-untyped-call]
    return gone


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched, and nothing that would have been is kept."""

    def scaled_grouped_mm(x: Tensor, weights: Tensor, *_: Any, **__: Any) -> Tensor:
        """Torch does not tell its shape."""
        return torch.empty(x.shape[0], weights.shape[2], dtype=torch.bfloat16, device=META)

    monkeypatch.setattr(Launch, "run", lambda _: None)
    monkeypatch.setattr(F, "scaled_grouped_mm", scaled_grouped_mm)


def forward_peak(
    sizes: list[tuple[int, int]], *, dtype: torch.dtype, quantization: str | None, num_choices: int, layers: int = 2
) -> int:
    """Bytes of the tensors of a forward pass, logits of the last row of each chunk included."""
    config = replace(MIXTRAL_8X7B, num_layers=layers, num_experts_per_tok=num_choices)
    backend = CudaBackend(config, H100, device=META, dtype=dtype, weight_dtype=QUANTIZATIONS[quantization])
    for piece in family_of(config).pieces(config):
        backend.prepare(piece, torch.empty(piece.shape, dtype=dtype, device=META))
    options: dict[str, Any] = {"router": None, "capacity_factor": None, "simulation": None}
    decoder = build_model(config, backend, make_router(config, **options))
    cache = backend.new_kv_cache(config.num_layers, 8, 16, decoder.attention_shape)
    batch = without_contents(sizes, config)
    batch = replace(batch, routing=replace(batch.routing, max_top_k=num_choices))
    with torch.inference_mode(), PeakOfTensors() as counter:
        decoder.logits(decoder.forward(batch, cache, None), batch.logits_indices)
    peak: int = counter.peak
    return peak


@pytest.mark.parametrize("num_choices", [2, 8])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("dtype", "tokens"), [("bfloat16", 2048), ("bfloat16", 1152), ("bfloat16", 300), ("float16", 2048)]
)
@pytest.mark.usefixtures("no_launches")
def test_a_step_takes_what_is_computed(dtype: str, tokens: int, quantization: str | None, num_choices: int) -> None:
    size = StepSize(
        dtype=dtype, quantization=quantization, num_tokens=tokens, num_seqs=1, context=tokens, num_choices=num_choices
    )
    estimate = activation_bytes(replace(MIXTRAL_8X7B, num_layers=2), size, backend="cuda")
    apart = (32 << 20) + 16 * 2 * tokens * 8  # the workspace of cuBLAS and the routing record
    peak = forward_peak([(0, tokens)], dtype=getattr(torch, dtype), quantization=quantization, num_choices=num_choices)
    assert estimate - apart == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize("num_choices", [2, 8])
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.usefixtures("no_launches")
def test_a_decode_takes_what_is_computed(batch: int, num_choices: int) -> None:
    size = StepSize(
        dtype="bfloat16", quantization="fp8", num_tokens=1024, num_seqs=batch, context=4096, num_choices=num_choices
    )
    estimate = graph_bytes(MIXTRAL_8X7B, size, backend="cuda")
    sizes = [(4095, 1)] * batch
    peak = forward_peak(sizes, dtype=torch.bfloat16, quantization="fp8", num_choices=num_choices)
    assert estimate == pytest.approx(peak, rel=0.03, abs=1 << 20)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_weights_take_what_is_planned(quantization: str | None) -> None:
    config = replace(MIXTRAL_8X7B, num_layers=2)
    backend = CudaBackend(config, H100, device=META, dtype=torch.bfloat16, weight_dtype=QUANTIZATIONS[quantization])
    for piece in family_of(config).pieces(config):
        backend.prepare(piece, torch.empty(piece.shape, dtype=torch.bfloat16, device=META))
    assert backend.weight_bytes == plan_model(config, quantization=quantization, memory_bytes=1).weight_bytes


def test_the_counter_counts_what_lives() -> None:
    with PeakOfTensors() as counter:
        first = torch.empty(1000, dtype=torch.uint8, device=META)
        view = first.view(10, 100)
        del first
        other = view.new_empty(500)
        del view
        torch.empty(900, dtype=torch.uint8, device=META)
    assert counter.peak == 1500
    assert other.nbytes == 500
