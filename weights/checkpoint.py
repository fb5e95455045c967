"""A checkpoint: a configuration, what its tensors are, and one pass over their values."""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weights.config import ModelConfig, load_config
from weights.errors import CheckpointError
from weights.files import find_file, has_file, read_json_object
from weights.header import HeaderEntry, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor; `nbytes` is its size as `read` gives it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


class Checkpoint(Protocol):
    """Tensors under their Hugging Face names, whatever the files call them."""

    @property
    def path(self) -> Path:
        """The folder or .gguf file, where the tokenizer is too."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, in the order in which `read` gives them, known without reading any."""

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, on the CPU. A tensor is read-only and is gone when the next one is asked for: copy it.

        Raises CheckpointError when a file turns out to be unreadable.
        """


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder of safetensors, or in a .gguf file.

    Reads the configuration and all headers, no values. Raises ConfigError or CheckpointError.
    """
    if path.suffix == ".gguf":
        from weights.gguf import GgufCheckpoint

        return GgufCheckpoint(path)
    return SafetensorsCheckpoint(path)


class SafetensorsCheckpoint:
    """A folder with config.json and safetensors: one file, shards with an index, or shards without one.

    `read` maps one shard at a time and returns the pages of each tensor as soon as the next one is asked for, so that
    the memory it takes is about one tensor's.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder
        self._config = load_config(folder)
        self._shards = {path: read_header(path) for path in _shard_paths(folder)}
        self._tensors: dict[str, TensorInfo] = {}
        home: dict[str, Path] = {}
        for path, entries in self._shards.items():
            for name, entry in entries.items():
                if name in home:
                    raise CheckpointError(f"tensor {name!r} is in two files: {home[name].name} and {path.name}")
                home[name] = path
                self._tensors[name] = TensorInfo(entry.shape, entry.dtype, entry.end - entry.start)
        if has_file(folder, INDEX_NAME):
            _check_index(folder, {name: path.name for name, path in home.items()})

    @property
    def path(self) -> Path:
        return self._path

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self) -> Iterator[tuple[str, Tensor]]:
        for path, entries in self._shards.items():
            yield from _read_shard(path, entries)


def _shard_paths(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, sorted by name."""
    if has_file(folder, SINGLE_NAME):
        return [find_file(folder, SINGLE_NAME)]
    if has_file(folder, INDEX_NAME):
        return [find_file(folder, name) for name in sorted(set(_weight_map(folder).values()))]
    names = sorted(entry.name for entry in folder.iterdir())
    # consolidated*.safetensors repeat the weights under other names, beside the shards of the same repository.
    shards = [name for name in names if name.endswith(".safetensors") and not name.startswith("consolidated")]
    if not shards:
        others = [name for name in names if name.endswith((".bin", ".pt", ".pth", ".safetensors"))]
        found = f", only {others[0]}" if others else ""
        raise CheckpointError(f"{folder}: no model*.safetensors{found}; weights are read from safetensors files only")
    return [find_file(folder, name) for name in shards]


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, as the index has it."""
    path = find_file(folder, INDEX_NAME)
    weight_map = read_json_object(path, max_bytes=MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map must be an object that maps tensor names to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{path}: tensor {name[:200]!r} must be in a .safetensors file, not {str(file)[:200]!r}"
            )
    return weight_map


def _check_index(folder: Path, home: Mapping[str, str]) -> None:
    if has_file(folder, SINGLE_NAME):
        return  # a single file needs no index, and none is read
    wrong = [name for name, file in _weight_map(folder).items() if home.get(name) != file]
    if wrong:
        raise CheckpointError(
            f"{folder / INDEX_NAME}: {len(wrong)} tensors are not in the file it names, first {wrong[0][:200]!r}"
        )


def _read_shard(path: Path, entries: Mapping[str, HeaderEntry]) -> Iterator[tuple[str, Tensor]]:
    size = max((entry.end for entry in entries.values()), default=0)
    try:
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            view.madvise(mmap.MADV_SEQUENTIAL)
            for name, entry in entries.items():
                if os.fstat(file.fileno()).st_size < size:  # touching pages past the end would kill the process
                    raise CheckpointError(f"{path}: was cut short while it was read")
                yield name, _tensor(view, entry)
                _release(view, entry)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _tensor(view: mmap.mmap, entry: HeaderEntry) -> Tensor:
    """The entry's values, in place; copied only when they lie at an address that their dtype cannot be read from."""
    if entry.start == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    aligned = entry.start % entry.dtype.itemsize == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        raw = torch.frombuffer(view, dtype=torch.uint8, count=entry.end - entry.start, offset=entry.start)
    return (raw if aligned else raw.clone()).view(entry.dtype).view(entry.shape)


def _release(view: mmap.mmap, entry: HeaderEntry) -> None:
    """Hands the entry's pages back to the system: they can be read again from the file."""
    start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
    if entry.end > entry.start:
        view.madvise(mmap.MADV_DONTNEED, start, entry.end - start)
