"""ExpertStore: the experts' weights as the kernels take them, 16 bits or 8, filled piece by piece."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.backends.cuda.moe import ExpertWeights, quantize_rows
from engine.backends.store import ParamStore
from weights.fp8 import dequantize
from weights.params import ParamSpec, Piece


class ExpertStore:
    """Quantises a tensor when it comes, on its device, so that the model in 16 bits is never in memory."""

    def __init__(self, specs: Iterable[ParamSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        own = list(specs)
        scales = [ParamSpec(spec.name, (*spec.shape[:2], 1), spec.kind) for spec in own]
        self._weights = ParamStore(own, device=device, dtype=dtype)
        self._scales = ParamStore(scales, device=device, dtype=torch.float32)
        self._device = device
        self._dtype = dtype

    def put(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        """As `ParamStore.put`. What has 8 bits gets a scale for each of its rows, the output channels; a tensor that
        came with scales and has the store's dtype stays as it is, to the bit.
        """
        if self._dtype.itemsize > 1:
            self._weights.put(piece, tensor, scale)
            return
        if scale is None or tensor.dtype != self._dtype:
            device = self._device
            wide = tensor.to(device, non_blocking=True) if scale is None else dequantize(tensor, scale, device)
            tensor, scale = quantize_rows(wide, self._dtype)
            scale = scale.unsqueeze(-1)
        self._scales.put(piece, scale)
        self._weights.put(piece, tensor)

    @property
    def num_bytes(self) -> int:
        """Of weights and scales."""
        return self._weights.num_bytes + self._scales.num_bytes

    def __contains__(self, param: str) -> bool:
        return param in self._weights

    def weights(self, layer: int) -> ExpertWeights:
        w13, w2 = f"layers.{layer}.w13", f"layers.{layer}.w2"
        return ExpertWeights(self._weights[w13], self._weights[w2], self._scale(w13), self._scale(w2))

    def _scale(self, param: str) -> Tensor | None:
        return self._scales[param].squeeze(-1) if param in self._scales else None
