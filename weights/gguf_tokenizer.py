"""The tokenizer inside a GGUF file -> tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence
from tokenizers.processors import TemplateProcessing

from weights.errors import CheckpointError
from weights.gguf_metadata import metadata, open_gguf

CONTROL, USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_SPECIAL_KEYS = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


def read_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer of a GGUF file and what belongs into its tokenizer_config.json (chat_template, bos_token, …).

    Byte-level BPE ("gpt2") is understood, with the pre-tokenizers gpt-2 and smollm. Raises CheckpointError for others
    and for a file whose lists do not fit together.
    """
    reader = open_gguf(path)
    values = metadata(reader)
    if values.get("tokenizer.ggml.model") != "gpt2":
        model = values.get("tokenizer.ggml.model")
        raise CheckpointError(f"{path}: tokenizer model {model!r} is not supported; only byte-level BPE ('gpt2') is")
    lists = {}
    for name in ("tokens", "token_type", "merges"):
        field = reader.get_field(f"tokenizer.ggml.{name}")
        if field is None:
            raise CheckpointError(f"{path}: tokenizer.ggml.{name} is missing")
        lists[name] = field.contents()
    tokens, kinds = lists["tokens"], lists["token_type"]
    if len(tokens) != len(kinds) or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{path}: tokenizer.ggml.tokens must be unique and as many as token_type")
    special = {key: _token(path, tokens, values[field]) for key, field in _SPECIAL_KEYS.items() if field in values}

    merges = [tuple(merge.split(" ", 1)) for merge in lists["merges"]]
    try:
        tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    except Exception as error:  # the library raises bare Exception for merges that do not fit the vocabulary
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: tokenizer.ggml.merges do not fit the tokens ({reason})") from None
    tokenizer.pre_tokenizer = _pre_tokenizer(path, values.get("tokenizer.ggml.pre"))
    tokenizer.decoder = ByteLevelDecoder()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    if values.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        bos = special["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokens.index(bos))]
        )
    return tokenizer, _tokenizer_config(values, special)


def write_tokenizer(gguf_path: Path, out: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json to the folder `out`. Raises as `read_tokenizer` does."""
    tokenizer, config = read_tokenizer(gguf_path)
    tokenizer.save(str(out / "tokenizer.json"))
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")


def _pre_tokenizer(path: Path, name: object) -> PreTokenizer:
    """How text is split before BPE: GPT-2's pattern on bytes; smollm splits off every digit first."""
    gpt2 = ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return Sequence([Digits(individual_digits=True), gpt2])
    if name == "gpt-2":
        return gpt2
    raise CheckpointError(f"{path}: pre-tokenizer {name!r} is not supported; known: gpt-2, smollm")


def _tokenizer_config(values: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    if "llama.context_length" in values:
        config["model_max_length"] = values["llama.context_length"]
    if "tokenizer.chat_template" in values:
        config["chat_template"] = values["tokenizer.chat_template"]
    return config


def _token(path: Path, tokens: list[str], token_id: int) -> str:
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{path}: special token id {token_id} is not below the vocabulary's {len(tokens)}")
    return tokens[token_id]
