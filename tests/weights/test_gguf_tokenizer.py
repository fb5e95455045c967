from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers

from tests.tiny import TINY_LLAMA, tiny_tensors
from tests.weights.gguf_files import write_gguf
from weights import demo
from weights.errors import CheckpointError
from weights.gguf_tokenizer import read_tokenizer, write_tokenizer

GOLDEN = Path(__file__).parent.parent / "golden" / "smollm2_tokenizer.json"

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
TOKENS = ["<s>", "</s>", "<user>", *"abc12", "Ġ", "ab", "Ġab", "12", "Ã", "©", "Ã©"]
KINDS = [CONTROL, CONTROL, USER_DEFINED] + [NORMAL] * 12
MERGES = ["a b", "Ġ ab", "1 2", "Ã ©"]


def write(path: Path, **changes: Any) -> Path:
    """A GGUF file with a byte-level tokenizer of 15 tokens; a change of None leaves a field out."""
    fields: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": TOKENS, "token_type": KINDS, "merges": MERGES}
    fields |= {"bos_token_id": 0, "eos_token_id": 1, "add_bos_token": False, "chat_template": "{{ messages }}"}
    fields |= changes
    adders: dict[str, Callable[[gguf.GGUFWriter], Callable[[Any], object]]] = {
        "model": lambda w: w.add_tokenizer_model,
        "pre": lambda w: w.add_tokenizer_pre,
        "tokens": lambda w: w.add_token_list,
        "token_type": lambda w: w.add_token_types,
        "merges": lambda w: w.add_token_merges,
        "bos_token_id": lambda w: w.add_bos_token_id,
        "eos_token_id": lambda w: w.add_eos_token_id,
        "add_bos_token": lambda w: w.add_add_bos_token,
        "chat_template": lambda w: w.add_chat_template,
    }

    def edit(writer: gguf.GGUFWriter) -> None:
        for name, value in fields.items():
            if value is not None:
                adders[name](writer)(value)

    write_gguf(path, TINY_LLAMA, tiny_tensors(TINY_LLAMA), edit=edit)
    return path


def tokens_of(tokenizer: tokenizers.Tokenizer, text: str, **options: Any) -> list[str]:
    tokens: list[str] = tokenizer.encode(text, **options).tokens
    return tokens


def test_bytes_are_merged_and_control_tokens_kept_whole(tmp_path: Path) -> None:
    tokenizer, config = read_tokenizer(write(tmp_path / "x.gguf"))
    assert tokenizer.get_vocab_size() == len(TOKENS)
    assert [tokenizer.id_to_token(i) for i in range(len(TOKENS))] == TOKENS
    text = "<s>ab ab<user>c12é</s>"
    encoded = tokenizer.encode(text)
    assert encoded.tokens == ["<s>", "ab", "Ġab", "<user>", "c", "12", "Ã©", "</s>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text
    assert tokenizer.decode(encoded.ids) == "ab ab<user>c12é"  # a user-defined token is text
    assert (config["bos_token"], config["eos_token"], config["chat_template"]) == ("<s>", "</s>", "{{ messages }}")
    assert config["model_max_length"] == 256


def test_smollm_splits_digits_first(tmp_path: Path) -> None:
    tokenizer, _ = read_tokenizer(write(tmp_path / "x.gguf", pre="smollm"))
    assert tokens_of(tokenizer, "ab12 ab") == ["ab", "1", "2", "Ġab"]


def test_a_beginning_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer, _ = read_tokenizer(write(tmp_path / "x.gguf", add_bos_token=True))
    assert tokens_of(tokenizer, "ab") == ["<s>", "ab"]
    assert tokens_of(tokenizer, "ab", add_special_tokens=False) == ["ab"]


def test_the_files_that_are_written_say_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", add_bos_token=True, pre="smollm")
    write_tokenizer(path, tmp_path)
    tokenizer, config = read_tokenizer(path)
    loaded = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokens_of(loaded, "<s>ab12 é") == tokens_of(tokenizer, "<s>ab12 é")
    assert json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer model 'llama' is not supported; only byte-level BPE"),
        ({"model": None}, "tokenizer model None is not supported"),
        ({"pre": "qwen2"}, "pre-tokenizer 'qwen2' is not supported; known: gpt-2, smollm"),
        ({"pre": None}, "pre-tokenizer None"),
        ({"tokens": None}, "tokens is missing"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a zzz"]}, "merges do not fit the tokens"),
        ({"merges": ["ab"]}, "merges do not fit the tokens"),
        ({"token_type": KINDS[:-1]}, "tokens must be unique and as many"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "tokens must be unique and as many"),
        ({"eos_token_id": 15}, "special token id 15 is not below the vocabulary's 15"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^[^\n]*x\.gguf: (tokenizer\.ggml\.)?{message}[^\n]*$"):
        read_tokenizer(write(tmp_path / "x.gguf", **changes))


@pytest.mark.demo
def test_smollm2_encodes_as_two_other_implementations_do(demo_checkpoint: Path, tmp_path: Path) -> None:
    write_tokenizer(demo.dense_gguf(demo_checkpoint.parent), tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))["texts"]
    assert len(cases) == 98
    for case in cases:
        assert tokenizer.encode(case["text"]).ids == case["ids"], case["text"]
        assert tokenizer.decode(case["ids"], skip_special_tokens=False) == case["text"]
