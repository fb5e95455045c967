from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from weights.checkpoint import TensorInfo
from weights.header import read_header
from weights.writer import ShardWriter, shard_names


def info(tensor: Tensor) -> TensorInfo:
    return TensorInfo(tuple(tensor.shape), tensor.dtype, tensor.nbytes)


def tensors() -> dict[str, Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b": torch.randn(7, 3).bfloat16().T,  # not contiguous
        "scalar": torch.tensor(2.5, dtype=torch.float16),
        "odd": torch.arange(5, dtype=torch.uint8),
        "after": torch.randn(2, 2),
    }


@pytest.mark.parametrize(("limit", "num_files"), [(10**6, 1), (60, 3), (1, 5)])
def test_the_reference_library_reads_what_is_written(tmp_path: Path, limit: int, num_files: int) -> None:
    written = tensors()
    infos = {name: info(tensor) for name, tensor in written.items()}
    with ShardWriter(tmp_path, infos, max_shard_bytes=limit) as writer:
        for name, tensor in written.items():
            writer.add(name, tensor)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == num_files
    read: dict[str, tuple[Tensor, str]] = {}
    for file in files:
        assert next(iter(read_header(file).values())).start % 8 == 0
        with safe_open(file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            read |= {name: (shard.get_tensor(name), file.name) for name in shard.keys()}  # noqa: SIM118
    assert all(torch.equal(read[name][0], tensor) for name, tensor in written.items())
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (num_files > 1)
    if num_files > 1:
        content = json.loads(index.read_text())
        assert content["weight_map"] == {name: file for name, (_, file) in read.items()}
        assert content["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())


def test_shards_are_filled_in_order() -> None:
    def names(*sizes: int) -> list[list[str]]:
        infos = {f"{i}": TensorInfo((size,), torch.uint8, size) for i, size in enumerate(sizes)}
        return list(shard_names(infos, 8).values())

    assert names(3, 4, 5) == [["0", "1"], ["2"]]
    assert names(4, 4, 1) == [["0", "1"], ["2"]]
    assert names(1, 20, 1) == [["0"], ["1"], ["2"]]
    infos = {"x": TensorInfo((1,), torch.uint8, 1)}
    assert list(shard_names(infos, 8)) == ["model.safetensors"]


def test_only_what_was_announced_is_taken(tmp_path: Path) -> None:
    written = tensors()
    infos = {name: info(tensor) for name, tensor in written.items()}
    wrong = ("b", written["b"]), ("a", written["a"].double()), ("a", written["a"][:2])
    for name, tensor in wrong:
        with (
            pytest.raises(AssertionError, match=name),
            ShardWriter(tmp_path, infos, max_shard_bytes=60) as writer,
        ):
            writer.add(name, tensor)
    with pytest.raises(AssertionError), ShardWriter(tmp_path, infos, max_shard_bytes=60) as writer:
        writer.add("a", written["a"])
