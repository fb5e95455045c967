from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_tensors, write_tiny_mixtral
from tests.weights.hub_server import COMMIT, REPO, Hub, hub_server
from weights.checkpoint import open_checkpoint
from weights.config import load_config
from weights.errors import CheckpointError, HubError
from weights.reader import resolve

USED = {
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}
UNUSED = {
    "pytorch_model.bin",
    "consolidated.00.pt",
    "consolidated.safetensors",
    "modeling_evil.py",
    "README.md",
    "runs/config.py",
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    write_tiny_mixtral(tmp_path / "source", shards=2)
    files = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    files |= {name: name.encode() for name in UNUSED | USED if name not in files}
    files["generation_config.json"] = b'{"eos_token_id": [5]}'
    with hub_server(files) as hub:
        yield hub


@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_a_repository_becomes_a_snapshot_of_links(hub: Hub, tmp_path: Path, revision: str | None) -> None:
    folder = resolve(REPO, revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert folder == tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
    assert {path.name for path in folder.iterdir()} == USED
    assert set(hub.downloads) == USED
    assert all(os.readlink(path).startswith("../../blobs/") for path in folder.iterdir())

    checkpoint = open_checkpoint(folder)
    assert checkpoint.config.eos_token_ids == (5,)
    expected = tiny_tensors(checkpoint.config)
    assert {name for name, tensor in checkpoint.read() if torch.equal(tensor, expected[name])} == expected.keys()


def test_a_configuration_comes_without_the_weights(hub: Hub, tmp_path: Path) -> None:
    folder = resolve(REPO, config_only=True, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert {path.name for path in folder.iterdir()} == set(hub.downloads) == {"config.json", "generation_config.json"}
    assert load_config(folder).eos_token_ids == (5,)
    assert resolve(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache") == folder
    assert {path.name for path in folder.iterdir()} == set(hub.downloads) == USED, "the rest follows when it is needed"


def test_a_snapshot_that_is_there_is_used_without_its_hub(hub: Hub, tmp_path: Path) -> None:
    folder = resolve(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    hub.downloads.clear()
    assert resolve(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache") == folder
    assert hub.downloads == []
    assert resolve(REPO, endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache") == folder


def test_a_link_planted_in_a_snapshot_is_not_followed(hub: Hub, tmp_path: Path) -> None:
    folder = resolve(REPO, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(tmp_path / "source" / shard.name)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: the link leaves"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("model", "revision", "message"),
    [("org/none", None, "cannot get org/none from the hub: .*404"), (REPO, "v9", "cannot get org/name at revision v9")],
)
def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path, model: str, revision: str | None, message: str) -> None:
    with pytest.raises(HubError, match=message) as caught:
        resolve(model, revision=revision, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(hub: Hub, tmp_path: Path) -> None:
    del hub
    with pytest.raises(HubError, match="cannot get org/name from the hub: ") as caught:
        resolve(REPO, endpoint="http://127.0.0.1:9", cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_paths_need_no_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "x.gguf").write_bytes(b"")
    assert resolve("org/name", endpoint=hub.endpoint) == Path("org/name")
    assert resolve(str(tmp_path), endpoint=hub.endpoint) == tmp_path
    assert resolve("x.gguf", endpoint=hub.endpoint) == Path("x.gguf")
    missing_paths = (
        "org/other",
        "other",
        "./org/x",
        "/org/name",
        "../../x",
        "a/b/c",
        "a/b.gguf",
        "-a/b",
        "a/..",
        "a\0/b",
        "~nobody/x",
        "x" * 999,
    )
    for missing in missing_paths:
        with pytest.raises(CheckpointError, match="no such folder, and not a repository id like org/name"):
            resolve(missing, endpoint=hub.endpoint)
    assert hub.num_requests == 0


def test_files_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    os.mkfifo(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match=r"must be a folder, a \.gguf file, or a repository id"):
        resolve(str(tmp_path / "model.safetensors"))
    with pytest.raises(CheckpointError, match="not a regular file"):
        resolve(str(tmp_path / "x.gguf"))
