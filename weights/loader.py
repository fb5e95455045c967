"""Checkpoint -> sink: everything is compared with what the family needs before a single value is read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weights.checkpoint import Checkpoint, TensorInfo
from weights.errors import CheckpointError
from weights.families import family_of
from weights.params import Piece

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class WeightSink(Protocol):
    """Where weights go: a backend's store, or a writer."""

    def prepare(self, piece: Piece, tensor: Tensor) -> None:
        """Takes one piece. `tensor` has the piece's shape and any of float32, float16, bfloat16.

        It may lie in a mapped file: copy what you keep, and do not write to it.
        """


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did: bytes of the tensors as they were read, and seconds of wall clock."""

    num_bytes: int
    seconds: float


def load(checkpoint: Checkpoint, sink: WeightSink, *, progress: bool = False) -> LoadReport:
    """Streams every piece of the checkpoint's family to `sink`, one tensor at a time, in file order.

    `progress` draws a bar with bytes and rate on stderr. Raises CheckpointError, before anything is read, when a tensor
    is missing, left over, or of another shape or dtype than the family needs.
    """
    pieces = match(checkpoint)
    total = sum(checkpoint.tensors[name].nbytes for name in pieces)
    start = time.perf_counter()
    with _ProgressBar(total, shown=progress) as bar:
        for name, tensor in checkpoint.read():
            if name in pieces:
                sink.prepare(pieces[name], tensor)
                bar.advance(checkpoint.tensors[name].nbytes)
    return LoadReport(total, time.perf_counter() - start)


def match(checkpoint: Checkpoint) -> dict[str, Piece]:
    """The piece for each tensor that is needed, by the tensor's name. Raises CheckpointError as `load` does."""
    config, tensors = checkpoint.config, checkpoint.tensors
    family = family_of(config)
    pieces = {piece.source: piece for piece in family.pieces(config)}
    _refuse("missing", (name for name in pieces if name not in tensors))
    pieces |= {piece.source: piece for piece in family.optional(config) if piece.source in tensors}
    _refuse("left over", (name for name in tensors if name not in pieces and not family.is_extra(config, name)))
    _refuse("of the wrong shape", _wrong_shapes(pieces, tensors))
    _refuse(
        "of the wrong dtype (float32, float16 and bfloat16 are read)",
        (f"{name} ({tensors[name].dtype})" for name in pieces if tensors[name].dtype not in FLOAT_DTYPES),
    )
    return pieces


def _wrong_shapes(pieces: Mapping[str, Piece], tensors: Mapping[str, TensorInfo]) -> Iterable[str]:
    for name, piece in pieces.items():
        if tensors[name].shape != piece.shape:
            yield f"{name} (has {list(tensors[name].shape)}, needs {list(piece.shape)})"


def _refuse(problem: str, found: Iterable[str]) -> None:
    """One line that counts what was found and names the first few."""
    names = list(found)
    if names:
        more = ", …" if len(names) > 3 else ""
        noun = "tensor" if len(names) == 1 else "tensors"
        raise CheckpointError(f"{len(names)} {noun} {problem}: {', '.join(name[:200] for name in names[:3])}{more}")


class _ProgressBar:
    """Bytes and rate on stderr, or nothing."""

    def __init__(self, total: int, *, shown: bool) -> None:
        self._bar = None
        if shown:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1000)

    def __enter__(self) -> _ProgressBar:
        return self

    def advance(self, num_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(num_bytes)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
