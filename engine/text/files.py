"""The files of a checkpoint that concern text -> TokenizerFiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weights.errors import CheckpointError
from weights.files import find_file, has_file, read_json_object

_MAX_BYTES = 1 << 27  # tokenizer.json of a vocabulary of 256,000 tokens takes 34 MB
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """What a checkpoint folder says about text."""

    spec: Mapping[str, Any]
    """tokenizer.json."""
    special_tokens: Mapping[str, str]
    """By name: bos_token, eos_token, unk_token, pad_token, as far as tokenizer_config.json names them."""
    additional_special_tokens: tuple[str, ...]
    add_bos_token: bool | None
    """None: as the post-processor of tokenizer.json does it."""
    eos_token_ids: frozenset[int]
    """Of generation_config.json and config.json."""
    chat_template: str | None
    tool_template: str | None
    """For chats with tools, where the checkpoint has another for those."""


def read_files(folder: Path, *, chat_template: str | None) -> TokenizerFiles:
    """Read a checkpoint folder; `chat_template`, a template or the path of one, goes before the folder's own.

    Only tokenizer.json has to be there. A template is `chat_template.jinja`, else `chat_template` in
    tokenizer_config.json: a string, or a list of named ones, of which "default" is taken and, for chats with tools,
    "tool_use". Raises CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    config = _read_optional(folder, "tokenizer_config.json")
    generation, model = _read_optional(folder, "generation_config.json"), _read_optional(folder, "config.json")
    add_bos = config.get("add_bos_token")
    if not isinstance(add_bos, bool | None):
        raise CheckpointError(f"{folder / 'tokenizer_config.json'}: add_bos_token must be true or false")
    if chat_template is None:
        template, tool_template = _own_templates(folder, config)
    else:
        template, tool_template = _given_template(chat_template), None
    return TokenizerFiles(
        spec=read_json_object(find_file(folder, "tokenizer.json"), max_bytes=_MAX_BYTES),
        special_tokens=_special_tokens(config),
        additional_special_tokens=_additional_special_tokens(config),
        add_bos_token=add_bos,
        eos_token_ids=_eos_ids(generation, folder / "generation_config.json") | _eos_ids(model, folder / "config.json"),
        chat_template=template,
        tool_template=tool_template,
    )


def _read_optional(folder: Path, name: str) -> dict[str, Any]:
    return read_json_object(find_file(folder, name), max_bytes=_MAX_BYTES) if has_file(folder, name) else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    contents = {name: _content(config.get(name)) for name in _SPECIAL_NAMES}
    return {name: content for name, content in contents.items() if content}


def _additional_special_tokens(config: Mapping[str, Any]) -> tuple[str, ...]:
    listed = config.get("additional_special_tokens")
    contents = map(_content, listed) if isinstance(listed, list) else ()
    return tuple(content for content in contents if content)


def _content(token: Any) -> str | None:
    """A token is written as a string, or as an object with its text and its flags."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _eos_ids(config: Mapping[str, Any], path: Path) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of token ids")
    return frozenset(ids)


def _own_templates(folder: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The checkpoint's template, and its other one for chats with tools."""
    if has_file(folder, "chat_template.jinja"):
        return _read_text(find_file(folder, "chat_template.jinja")), None
    template, tool_template = config.get("chat_template"), None
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
        template, tool_template = named.get("default"), named.get("tool_use")
    if not isinstance(template, str | None) or not isinstance(tool_template, str | None):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: chat_template must be a string or a list of named templates"
        )
    return template, tool_template


def _given_template(chat_template: str) -> str:
    if "{{" in chat_template or "{%" in chat_template:
        return chat_template
    path = Path(chat_template)
    if not path.is_file():
        raise CheckpointError(f"chat template {chat_template!r}: neither a Jinja template nor a file")
    return _read_text(path)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError(f"{path}: not UTF-8") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
