"""A checkpoint: a configuration, what its tensors are, and one pass over their values."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weights.config import ModelConfig, load_config
from weights.errors import CheckpointError
from weights.files import find_file, has_file, read_json_object
from weights.fp8 import all_experts_fp8
from weights.header import HeaderEntry, read_header
from weights.read_ahead import Extent, read_ahead
from weights.staging import HostStaging, Ring, Staging

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

    def read(
        self, names: Collection[str] | None = None, *, staging: Staging | None = None
    ) -> Generator[tuple[str, Tensor], None, None]:
        """The tensors in `names` (None: all), each once, on the CPU. Copy a tensor: when the next one is asked for, its
        memory is used again, from when the event that `staging` then records has fired (None: at once).

        Raises CheckpointError when a file turns out to be unreadable. Close what is not read to its end.
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

    `read` runs ahead as far as `staging` allows, or by two of the largest tensors if those are more, so that one is
    read while another is taken; but by no more than the largest shard. That is the memory it takes.

    Example: the largest tensors of 8x7B, embedding and lm_head, have 262 MB, in shards of 5 GB: it takes 524 MB.
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
        self._config = replace(self._config, fp8_experts=all_experts_fp8(self._config, self._tensors))

    @property
    def path(self) -> Path:
        return self._path

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(
        self, names: Collection[str] | None = None, *, staging: Staging | None = None
    ) -> Generator[tuple[str, Tensor], None, None]:
        ends = {path: max((entry.end for entry in own.values()), default=0) for path, own in self._shards.items()}
        extents = [
            Extent(name, path, entry, ends[path])
            for path, entries in self._shards.items()
            for name, entry in entries.items()
            if names is None or name in names
        ]
        staging = staging or HostStaging()
        largest = max((extent.nbytes for extent in extents), default=0)
        largest_shard = max(_data_bytes(entries) for entries in self._shards.values())
        ahead = min(max(staging.ahead_bytes, 2 * largest), largest_shard)
        yield from read_ahead(extents, Ring(staging, max(largest, ahead)))


def _data_bytes(entries: Mapping[str, HeaderEntry]) -> int:
    return sum(entry.end - entry.start for entry in entries.values())


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
