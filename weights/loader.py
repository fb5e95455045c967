"""Checkpoint -> sink: everything is compared with what the family needs before a single value is read."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weights.checkpoint import Checkpoint, TensorInfo
from weights.errors import refuse
from weights.families import family_of
from weights.fp8 import is_unread_scale, read_scales, scale_names, scale_shapes
from weights.params import Piece
from weights.staging import staging_for

CPU = torch.device("cpu")
FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class WeightSink(Protocol):
    """Where weights go: a backend's store, or a writer."""

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        """Takes one piece. `tensor` has the piece's shape and any of float32, float16, bfloat16; with a `scale`,
        float32 [rows, 1], it is float8_e4m3fn and stands for tensor * scale.

        Its memory is used again when this returns: copy what you keep, on the current stream where it goes to a device.
        """


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did: bytes of the tensors as they were read, and seconds of wall clock."""

    num_bytes: int
    seconds: float


def load(checkpoint: Checkpoint, sink: WeightSink, *, device: torch.device = CPU, progress: bool = False) -> LoadReport:
    """Streams every piece of the checkpoint's family to `sink`, one tensor at a time, while the next ones are read.

    `device` is where the sink puts them: for a CUDA device, tensors come in pinned memory, from which copies on its
    current stream need not be waited for. `progress` draws a bar with bytes and rate on stderr. Raises CheckpointError,
    before anything is read, when a tensor is missing, left over, or of another shape or dtype than the family needs;
    before any weight is read, when a scale is not positive and finite; and later, when a file cannot be read. What the
    sink raises ends the load, too.
    """
    pieces = match(checkpoint)
    names = scale_names(checkpoint.config, pieces, checkpoint.tensors)
    total = sum(checkpoint.tensors[name].nbytes for name in (*pieces, *names.values()))
    start = time.perf_counter()
    scales = read_scales(checkpoint, names, pieces)
    with (
        _ProgressBar(total, shown=progress) as bar,
        closing(checkpoint.read(pieces, staging=staging_for(device))) as tensors,
    ):
        bar.advance(sum(checkpoint.tensors[name].nbytes for name in names.values()))
        for name, tensor in tensors:
            sink.prepare(pieces[name], tensor, scales.get(name))
            bar.advance(tensor.nbytes)
    return LoadReport(total, time.perf_counter() - start)


def match(checkpoint: Checkpoint) -> dict[str, Piece]:
    """The piece for each tensor that is needed, by the tensor's name. Raises CheckpointError as `load` does."""
    config, tensors = checkpoint.config, checkpoint.tensors
    family = family_of(config)
    pieces = {piece.source: piece for piece in family.pieces(config)}
    refuse("missing", (name for name in pieces if name not in tensors))
    pieces |= {piece.source: piece for piece in family.optional(config) if piece.source in tensors}
    scales = scale_names(config, pieces, tensors)
    refuse("missing", (scale for scale in scales.values() if scale not in tensors))
    floats = [name for name in pieces if name not in scales] + list(scales.values())
    refuse(
        "of the wrong dtype (float32, float16 and bfloat16 are read; float8_e4m3fn where quantization_config has it)",
        (f"{name} ({tensors[name].dtype})" for name in floats if tensors[name].dtype not in FLOAT_DTYPES),
    )
    known = {*pieces, *scales.values()}
    refuse(
        "left over",
        (
            name
            for name in tensors
            if name not in known and not family.is_extra(config, name) and not is_unread_scale(config, pieces, name)
        ),
    )
    refuse("of the wrong shape", _wrong_shapes(pieces, scales, tensors))
    return pieces


def _wrong_shapes(
    pieces: Mapping[str, Piece], scales: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> Iterable[str]:
    allowed: dict[str, tuple[tuple[int, ...], ...]] = {name: (piece.shape,) for name, piece in pieces.items()}
    allowed |= {scale: scale_shapes(pieces[name].shape[0]) for name, scale in scales.items()}
    for name, shapes in allowed.items():
        if tensors[name].shape not in shapes:
            needed = " or ".join(str(list(shape)) for shape in shapes)
            yield f"{name} (has {list(tensors[name].shape)}, needs {needed})"


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
