import os
from pathlib import Path
from typing import Any

import pytest

from engine.text import Tokenizer
from tests.engine.text.checkpoints import byte_level, write_json
from weights.errors import CheckpointError


def refused(folder: Path, match: str, **options: Any) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        Tokenizer.load(folder, **options)
    assert "\n" not in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"nowhere: no such checkpoint folder$")


def test_no_tokenizer(tmp_path: Path) -> None:
    refused(tmp_path, r"tokenizer\.json: no such file$")


def test_the_other_files_may_be_absent(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(folder)
    assert not tokenizer.has_chat_template
    assert tokenizer.eos_token_ids == set()


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_config", "generation_config", "config"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"NaN", b"[" * 100_000])
def test_files_that_are_not_json(folder: Path, name: str, content: bytes) -> None:
    (folder / f"{name}.json").write_bytes(content)
    refused(folder, rf"{name}\.json")


@pytest.mark.parametrize(
    "tokenizer",
    [
        {},
        {"model": None},
        {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": {"type": "ByteLevel"}},
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
        {"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}},
    ],
)
def test_json_that_is_no_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    refused(write_json(tmp_path, tokenizer=tokenizer), r"^tokenizer\.json: ")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_a_pipe_is_not_read(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refused(folder, "not a regular file")


@pytest.mark.parametrize("value", ["2", 1.5, True, -1, [2, "3"], {}])
def test_eos_ids_that_are_none(folder: Path, value: Any) -> None:
    refused(
        write_json(folder, generation_config={"eos_token_id": value}), "generation_config.json: eos_token_id must be"
    )


@pytest.mark.parametrize("value", ["yes", 1])
def test_add_bos_token_is_a_bool(tmp_path: Path, value: Any) -> None:
    refused(byte_level(tmp_path, add_bos_token=value), "add_bos_token must be true or false")


def test_add_bos_token_needs_a_bos_token(tmp_path: Path) -> None:
    refused(
        byte_level(tmp_path, add_bos_token=True, bos_token=None), "add_bos_token is true, but there is no bos_token"
    )


def test_the_default_of_named_templates(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    tokenizer = Tokenizer.load(byte_level(tmp_path, chat_template=named))
    assert tokenizer.decode(tokenizer.encode_chat([]), skip_special_tokens=False) == "<s>yes"
    assert not Tokenizer.load(byte_level(tmp_path, chat_template=named[:1])).has_chat_template


def test_a_template_file_goes_before_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("file é", encoding="utf-8")
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode_chat([])) == "file é"
    tokenizer = Tokenizer.load(folder, chat_template="{{ 'argument' }}")
    assert tokenizer.decode(tokenizer.encode_chat([])) == "argument"


def test_templates_that_are_none(folder: Path, tmp_path: Path) -> None:
    refused(folder, r"^chat template: line 2: ", chat_template="{{ a }}\n{% for %}")
    refused(
        folder, r"^chat template 'nowhere\.jinja': neither a Jinja template nor a file$", chat_template="nowhere.jinja"
    )
    refused(byte_level(tmp_path / "other", chat_template=7), "chat_template must be a string or a list")
    named: list[Any] = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": 7}]
    refused(byte_level(tmp_path / "named", chat_template=named), "chat_template must be a string or a list")
    named = [named[0], {"name": "tool_use", "template": "{% for %}"}]
    refused(byte_level(tmp_path / "broken", chat_template=named), r"^chat template: line 1: ")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    refused(folder, r"chat_template\.jinja: not UTF-8$")
