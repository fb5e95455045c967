"""ParamStore: parameters in the reference layout, filled piece by piece. What the torch and reference backends keep."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from weights.params import ParamSpec, Piece


class ParamStore:
    """Allocates a parameter on its first piece, on its device and in its dtype, so that a load needs no second copy."""

    def __init__(self, specs: Iterable[ParamSpec], *, device: torch.device, dtype: torch.dtype) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._params: dict[str, Tensor] = {}
        self._device = device
        self._dtype = dtype

    def put(self, piece: Piece, tensor: Tensor) -> None:
        """Copy `tensor` to the rows it fills. Shapes were checked against the specs before the load began."""
        if piece.param not in self._params:
            shape = self._specs[piece.param].shape
            self._params[piece.param] = torch.empty(shape, dtype=self._dtype, device=self._device)
        whole = self._params[piece.param]
        target = whole if piece.expert is None else whole[piece.expert]
        target[piece.row : piece.row + piece.shape[0]].copy_(tensor)

    def __getitem__(self, param: str) -> Tensor:
        return self._params[param]

    def __contains__(self, param: str) -> bool:
        return param in self._params
