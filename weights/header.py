"""The header of a safetensors file, checked before a byte of data is believed.

A file is 8 bytes (the header's length N, little-endian), N bytes of JSON, and the data. The JSON maps each tensor's
name to its dtype, shape and [start, end) within the data; `__metadata__` is free. Example: a file of one [2, 3] float32
tensor has data of 24 bytes and the entry {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weights.errors import CheckpointError
from weights.strict_json import parse_object

MAX_HEADER_BYTES = 100_000_000

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a file: [start, end) are byte positions from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, HeaderEntry]:
    """The tensors of a safetensors file, in the order of their data.

    The ranges are sure to tile the data exactly, each of the size that its shape and dtype need; otherwise it raises
    CheckpointError, naming the file and the tensor.
    """
    try:
        with path.open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{path}: not a safetensors file (shorter than 8 bytes)")
            length = int.from_bytes(prefix, "little")
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path}: header of {length:,} bytes is over the limit of {MAX_HEADER_BYTES:,}")
            if 8 + length > file_size:
                raise CheckpointError(
                    f"{path}: header of {length:,} bytes is longer than the file ({file_size:,} bytes)"
                )
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    try:
        header = parse_object(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: header: {error}") from None
    header.pop("__metadata__", None)
    entries = {name: _entry(f"{path}: tensor {name[:200]!r}", value) for name, value in header.items()}
    return _tiled(path, entries, first=8 + length, last=file_size)


def _entry(where: str, value: Any) -> HeaderEntry:
    """One entry, with positions still relative to the data."""
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise CheckpointError(f"{where}: entry must have dtype, shape and data_offsets")
    dtype_name, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise CheckpointError(f"{where}: unknown dtype {str(dtype_name)[:40]!r}")
    if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: shape must be a list of at most 16 counts")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{where}: data_offsets must be two counts")
    dtype = DTYPES[dtype_name]
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
        if nbytes >= 1 << 63:
            raise CheckpointError(f"{where}: shape is too large to be addressed")
    start, end = offsets
    if end - start != nbytes:
        raise CheckpointError(f"{where}: shape and dtype need {nbytes:,} bytes, data_offsets give {end - start:,}")
    return HeaderEntry(dtype, tuple(shape), start, end)


def _tiled(path: Path, entries: Mapping[str, HeaderEntry], *, first: int, last: int) -> dict[str, HeaderEntry]:
    """The entries in file order with absolute positions. They must fill [first, last) without gap or overlap."""
    result = {}
    position = first
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        start, end = first + entry.start, first + entry.end
        if start != position:
            problem = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {name[:200]!r} {problem} (byte {start:,} instead of {position:,})")
        if end > last:
            raise CheckpointError(
                f"{path}: tensor {name[:200]!r} runs past the end of the file ({end:,} > {last:,} bytes)"
            )
        result[name] = HeaderEntry(entry.dtype, entry.shape, start, end)
        position = end
    if position != last:
        raise CheckpointError(f"{path}: {last - position:,} bytes at the end belong to no tensor")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
