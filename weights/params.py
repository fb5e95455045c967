"""The engine's parameters and the checkpoint tensors they are put together from.

A parameter is what a backend holds; a piece is what a checkpoint stores. Pieces are stacked row by row:

    param "layers.0.qkv" [(H + 2*KV)*hd, D]  =  q_proj rows, then k_proj rows, then v_proj rows   (expert None)
    param "layers.0.w13" [E, 2F, D]          =  for expert e: w1 (gate) at row 0, w3 (up) at row F
    param "layers.0.w2"  [E, D, F]           =  for expert e: w2 at row 0

Example, F = 3: expert 2's `w3` of shape [3, D] is Piece(param="layers.0.w13", expert=2, row=3) and fills
`w13[2, 3:6, :]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ParamKind(StrEnum):
    EMBEDDING = "embedding"
    ATTENTION = "attention"
    NORM = "norm"
    ROUTER = "router"
    EXPERT = "expert"
    LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter in the reference layout: its name, its whole shape and what kind of weight it is."""

    name: str
    shape: tuple[int, ...]
    kind: ParamKind


@dataclass(frozen=True, slots=True)
class Piece:
    """One checkpoint tensor and the rows of a parameter that it fills.

    `source` is the tensor's name in the checkpoint and `shape` the shape it must have there. It fills rows
    [row, row + shape[0]) of the parameter, or of `parameter[expert]` when `expert` is not None.
    """

    source: str
    shape: tuple[int, ...]
    param: str
    expert: int | None = None
    row: int = 0
