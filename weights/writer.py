"""Writes safetensors shards tensor by tensor: each header comes first, so a checkpoint never has to fit in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from weights.checkpoint import INDEX_NAME, SINGLE_NAME, TensorInfo
from weights.header import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Takes the tensors announced at construction, in that order, into shards of at most `max_shard_bytes`.

    A tensor is never split, so one larger than that has a shard of its own. A single shard is called model.safetensors;
    more are numbered and come with an index. Used as a context manager; leaving it without error after the last tensor
    completes the files. Raises OSError when the disk does.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], *, max_shard_bytes: int) -> None:
        self._folder = folder
        self._tensors = tensors
        self._shards = shard_names(tensors, max_shard_bytes)
        self._home = [(name, file) for file, names in self._shards.items() for name in names]
        self._num_written = 0
        self._file: BinaryIO | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends the next tensor, which must be the one announced: same name, shape and dtype."""
        expected, shard = self._home[self._num_written]
        info = self._tensors[name]
        assert (name, tuple(tensor.shape), tensor.dtype) == (expected, info.shape, info.dtype), name
        if self._file is None:
            self._file = (self._folder / shard).open("wb")
            self._file.write(header_bytes({name: self._tensors[name] for name in self._shards[shard]}))
        tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tofile(self._file)
        self._num_written += 1
        if name == self._shards[shard][-1]:
            self._file.close()
            self._file = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if error is not None:
            return
        assert self._num_written == len(self._home)
        if len(self._shards) > 1:
            total = sum(info.nbytes for info in self._tensors.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(self._home)}
            (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2), encoding="utf-8")


def shard_names(tensors: Mapping[str, TensorInfo], max_shard_bytes: int) -> dict[str, list[str]]:
    """File name -> the tensors it holds, filled in order.

    Example: sizes 3, 4, 5 with a limit of 8 make model-00001-of-00002 [3, 4] and model-00002-of-00002 [5].
    """
    groups: list[list[str]] = []
    room = 0
    for name, info in tensors.items():
        if not groups or info.nbytes > room:
            groups.append([])
            room = max_shard_bytes
        groups[-1].append(name)
        room -= info.nbytes
    if len(groups) == 1:
        return {SINGLE_NAME: groups[0]}
    return {f"model-{i + 1:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups)}


def header_bytes(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The first bytes of a shard: length, then JSON padded with spaces so that the data starts at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, info in tensors.items():
        header[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [position, position + info.nbytes],
        }
        position += info.nbytes
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data
