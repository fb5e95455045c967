"""ParamStore: parameters in the reference layout, filled piece by piece. What the torch and reference backends keep."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from weights.fp8 import dequantize
from weights.params import ParamSpec, Piece


class ParamStore:
    """Allocates a parameter on its first piece, on its device and in its dtype, so that a load needs no second copy."""

    def __init__(self, specs: Iterable[ParamSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._params: dict[str, Tensor] = {}
        self._device = device
        self._dtype = dtype

    def put(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        """Copy `tensor`, or tensor * scale, to the rows it fills. Shapes were checked before the load began.

        From pinned memory to a CUDA device the copy may still be under way when this returns.
        """
        if piece.param not in self._params:
            shape = self._specs[piece.param].shape
            self._params[piece.param] = torch.empty(shape, dtype=self._dtype, device=self._device)
        whole = self._params[piece.param]
        target = whole if piece.expert is None else whole[piece.expert]
        if scale is not None:
            tensor = dequantize(tensor, scale, self._device)
        elif tensor.dtype != self._dtype:
            tensor = tensor.to(self._device, non_blocking=True)  # torch would convert on the CPU, and then copy
        target[piece.row : piece.row + piece.shape[0]].copy_(tensor, non_blocking=True)

    @property
    def num_bytes(self) -> int:
        """Of all parameters that any piece of came."""
        return sum(tensor.nbytes for tensor in self._params.values())

    def __getitem__(self, param: str) -> Tensor:
        return self._params[param]

    def __contains__(self, param: str) -> bool:
        return param in self._params
