from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import TINY_MIXTRAL, tiny_tensors, write_tiny_mixtral
from weights.checkpoint import INDEX_NAME, Checkpoint, open_checkpoint
from weights.errors import CheckpointError, ConfigError
from weights.header import read_header
from weights.staging import HostStaging


def read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in checkpoint.read()}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_tiny_mixtral(tmp_path / "model", shards=3)
    return tmp_path / "model"


def edit_index(folder: Path, changes: dict[str, object]) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"] |= changes
    (folder / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_is_read_once_in_file_order(tmp_path: Path, shards: int, dtype: str) -> None:
    config = write_tiny_mixtral(tmp_path, seed=3, shards=shards, dtype=dtype)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == config
    assert checkpoint.path == tmp_path
    expected = tiny_tensors(config, seed=3)
    names = []
    for name, tensor in checkpoint.read():
        names.append(name)
        info = checkpoint.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype, tensor.nbytes) == (info.shape, info.dtype, info.nbytes)
        assert torch.equal(tensor, expected[name])
    assert names == list(checkpoint.tensors)
    assert sorted(names) == sorted(expected)


def test_shards_need_no_index(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded / "consolidated.safetensors")
    expected = tiny_tensors(TINY_MIXTRAL)
    read = read_all(open_checkpoint(sharded))
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_tensors_at_odd_addresses(tmp_path: Path) -> None:
    """The format asks for no alignment: an odd number of bytes before a float tensor is legal."""
    write_tiny_mixtral(tmp_path)
    path = tmp_path / "model.safetensors"
    values = torch.randn(3, 5)
    data = b"abc" + values.numpy().tobytes()
    header = {
        "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "x": {"dtype": "F32", "shape": [3, 5], "data_offsets": [3, 63]},
        "none": {"dtype": "F32", "shape": [0, 5], "data_offsets": [63, 63]},
    }
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert read_header(path)["x"].start % 4 == 3
    for _, tensor in open_checkpoint(tmp_path).read():
        assert not tensor.numel() or tensor.data_ptr() % tensor.element_size() == 0
    read = read_all(open_checkpoint(tmp_path))
    assert torch.equal(read["x"], values)
    assert bytes(read["odd"].tolist()) == b"abc"
    assert read["none"].shape == (0, 5)


def test_a_tensor_that_is_kept_is_no_freed_memory(sharded: Path) -> None:
    """A sink that breaks the rule and keeps a view may find other values in it, and the process lives on."""
    kept = dict(open_checkpoint(sharded).read())
    assert {name: tuple(tensor.clone().shape) for name, tensor in kept.items()} == {
        name: tuple(tensor.shape) for name, tensor in tiny_tensors(TINY_MIXTRAL).items()
    }


def test_only_what_is_named_is_read(sharded: Path) -> None:
    """In the order of the files; what is not named may be on bad disk."""
    checkpoint = open_checkpoint(sharded)
    names = [name for name in reversed(list(checkpoint.tensors)) if ".experts.1." in name]
    last = sharded / "model-00003-of-00003.safetensors"
    wanted = [name for name in names if name not in read_header(last)]
    os.truncate(last, 100)
    assert 0 < len(wanted) < len(names)
    read = {name: tensor.clone() for name, tensor in checkpoint.read(wanted)}
    assert list(read) == list(reversed(wanted))
    expected = tiny_tensors(TINY_MIXTRAL)
    assert all(torch.equal(read[name], expected[name]) for name in wanted)
    assert not list(checkpoint.read([]))


def test_a_hub_snapshot(tmp_path: Path) -> None:
    config = write_tiny_mixtral(tmp_path / "plain", shards=2)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    assert read_all(open_checkpoint(snapshot)).keys() == tiny_tensors(config).keys()


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/x.safetensors", "sub/x.safetensors"])
def test_an_index_that_names_a_path(sharded: Path, name: str) -> None:
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "outside.safetensors")
    edit_index(sharded, {"model.norm.weight": name})
    with pytest.raises(CheckpointError, match="must be a plain name inside the folder"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone.safetensors", r"gone\.safetensors: no such file"),
        ("pytorch_model.bin", r"must be in a \.safetensors file"),
        (3, r"must be in a \.safetensors file"),
        ("model-00003-of-00003.safetensors", "1 tensors are not in the file it names, first 'model.norm.weight'"),
    ],
)
def test_an_index_that_is_wrong(sharded: Path, value: object, message: str) -> None:
    edit_index(sharded, {"model.norm.weight": value})
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(sharded)


@pytest.mark.parametrize("content", ["{", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=INDEX_NAME):
        open_checkpoint(sharded)


def test_an_index_that_names_a_tensor_nobody_has(sharded: Path) -> None:
    edit_index(sharded, {"model.extra": "model-00001-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match=r"first 'model\.extra'"):
        open_checkpoint(sharded)


def test_links_and_fifos(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00003.safetensors"
    shard.rename(sharded.parent / "elsewhere.safetensors")
    shard.symlink_to("../elsewhere.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: the link leaves"):
        open_checkpoint(sharded)
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(sharded)


def test_a_tensor_in_two_files(sharded: Path) -> None:
    (sharded / INDEX_NAME).unlink()
    save_file({"model.norm.weight": torch.ones(32)}, sharded / "zzz.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' is in two files: model-00001.* and zzz"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt", "consolidated.safetensors"])
def test_only_safetensors_of_this_layout(tmp_path: Path, name: str) -> None:
    write_tiny_mixtral(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"only {name}; weights are read from safetensors files only"):
        open_checkpoint(tmp_path)


def test_no_weights_and_no_folder(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no model\*\.safetensors; weights are read"):
        open_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        open_checkpoint(tmp_path / "nothing")


def test_a_file_cut_short_after_its_header_was_read(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    last = sharded / "model-00003-of-00003.safetensors"
    os.truncate(last, last.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: has .* when its header was read"):
        next(checkpoint.read())


class Sized(HostStaging):
    """Remembers how much memory was taken."""

    def __init__(self, ahead_bytes: int) -> None:
        self.ahead_bytes = ahead_bytes
        self.sizes: list[int] = []

    def allocate(self, num_bytes: int) -> Tensor:
        self.sizes.append(num_bytes)
        return super().allocate(num_bytes)


@pytest.mark.parametrize(
    ("ahead", "taken"), [(0, 2 * 6400), (2 * 6400 - 1, 2 * 6400), (16_000, 16_000), (99_999, 19_200)]
)
def test_two_of_the_largest_tensors_fit_but_no_more_than_a_shard(tmp_path: Path, ahead: int, taken: int) -> None:
    """Else none would be read while another is taken."""
    write_tiny_mixtral(tmp_path)
    save_file({name: torch.zeros(1600) for name in "abc"}, tmp_path / "model.safetensors")
    staging = Sized(ahead)
    assert len(list(open_checkpoint(tmp_path).read(staging=staging))) == 3
    assert staging.sizes == [taken]


def test_a_shard_of_one_large_tensor(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path)
    save_file({"a": torch.zeros(1600)}, tmp_path / "model.safetensors")
    staging = Sized(0)
    list(open_checkpoint(tmp_path).read(staging=staging))
    assert staging.sizes == [6400]


def test_a_file_of_empty_tensors(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path)
    save_file({"a": torch.zeros(0, 5), "b": torch.zeros(0)}, tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in open_checkpoint(tmp_path).read()} == {"a": (0, 5), "b": (0,)}


def test_the_overrides_of_tiny_are_written(tmp_path: Path) -> None:
    config = write_tiny_mixtral(tmp_path, num_heads=3, num_kv_heads=1, head_dim=6, hidden_size=20, vocab_size=31)
    assert config == replace(TINY_MIXTRAL, num_heads=3, num_kv_heads=1, head_dim=6, hidden_size=20, vocab_size=31)
    assert open_checkpoint(tmp_path).config == config
