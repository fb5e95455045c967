from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from weights.errors import CheckpointError
from weights.files import find_file, has_file, new_folder, read_json_object


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "outside.json").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"a": 1}')
    return tmp_path / "model"


def test_a_plain_file(folder: Path) -> None:
    assert find_file(folder, "config.json") == folder / "config.json"
    assert read_json_object(folder / "config.json", max_bytes=8) == {"a": 1}


@pytest.mark.parametrize("name", ["../outside.json", "x/../config.json", "", ".", "..", "x\\config.json", "a\0b"])
def test_a_name_is_no_path(folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="plain name inside the folder"):
        find_file(folder, name)


def test_an_absolute_name(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="plain name inside the folder"):
        find_file(folder, str(folder.parent / "outside.json"))


def test_links(folder: Path) -> None:
    (folder / "inside").symlink_to("config.json")
    assert find_file(folder, "inside").read_text() == '{"a": 1}'
    (folder / "outside").symlink_to("../outside.json")
    with pytest.raises(CheckpointError, match="link leaves the checkpoint folder"):
        find_file(folder, "outside")
    (folder / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="loop"):
        find_file(folder, "loop")
    (folder / "dangling").symlink_to("nothing")
    with pytest.raises(CheckpointError, match="no such file"):
        find_file(folder, "dangling")
    assert has_file(folder, "dangling")
    assert not has_file(folder, "nothing")


def test_the_folder_itself_may_be_a_link(folder: Path) -> None:
    (folder.parent / "alias").symlink_to("model")
    assert find_file(folder.parent / "alias", "config.json").read_text() == '{"a": 1}'


def test_a_hub_snapshot_links_into_its_own_blobs_and_no_others(tmp_path: Path) -> None:
    for repo in ("models--a--b", "models--a--c"):
        (tmp_path / repo / "snapshots" / "f00").mkdir(parents=True)
        (tmp_path / repo / "blobs").mkdir()
        (tmp_path / repo / "blobs" / "123").write_text(repo)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "f00"
    (snapshot / "own").symlink_to("../../blobs/123")
    (snapshot / "other").symlink_to("../../../models--a--c/blobs/123")
    (snapshot / "above").symlink_to("../../refs")
    (tmp_path / "models--a--b" / "refs").write_text("")
    assert find_file(snapshot, "own").read_text() == "models--a--b"
    for name in ("other", "above"):
        with pytest.raises(CheckpointError, match="link leaves"):
            find_file(snapshot, name)


def test_only_regular_files(folder: Path) -> None:
    os.mkfifo(folder / "fifo")
    (folder / "sub").mkdir()
    (folder / "null").symlink_to("/dev/null")
    for name in ("fifo", "sub"):
        with pytest.raises(CheckpointError, match="not a regular file"):
            find_file(folder, name)
    with pytest.raises(CheckpointError, match="link leaves"):
        find_file(folder, "null")


def test_json_files_are_bounded_and_name_their_path(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 7 bytes"):
        read_json_object(folder / "config.json", max_bytes=7)
    (folder / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bad\.json: malformed"):
        read_json_object(folder / "bad.json", max_bytes=100)


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    with new_folder(target) as partial:
        (partial / "a").write_text("1")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["a"]

    with suppress(KeyboardInterrupt), new_folder(tmp_path / "other") as partial:
        (partial / "a").write_text("1")
        raise KeyboardInterrupt
    assert not (tmp_path / "other").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"deep"}


def test_a_new_folder_replaces_nothing_but_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as partial:
        (partial / "a").write_text("1")
    assert (tmp_path / "empty" / "a").exists()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file"):
        with pytest.raises(CheckpointError, match="there already"), new_folder(tmp_path / name):
            pass
