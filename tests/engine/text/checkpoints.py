"""Checkpoint folders with small tokenizers of both kinds, and the real Mixtral one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteFallback, Fuse, Replace, Sequence, Strip
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend
from tokenizers.normalizers import Replace as ReplaceNormalizer
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing

GOLDEN = Path(__file__).parents[2] / "golden"
MIXTRAL = GOLDEN / "mixtral-8x7b"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = ("he", "ll", "hell", "hello", "in", "im", "end", "Ġw", "Ġworld", "ST", "OP", "STOP")


def byte_level(folder: Path, *, specials_special: bool = True, **config: Any) -> Path:
    """Byte-level BPE with ids 0-255 for bytes, a few words, then <s>, <|im_start|>, <|im_end|>: under 280 tokens."""
    vocab = {char: index for index, char in enumerate(sorted(ByteLevel.alphabet()))}
    merges = []
    for word in WORDS:
        left, right = word[:1], word[1:]
        if right not in vocab:
            left, right = word[:2], word[2:]
        if left in vocab and right in vocab:
            merges.append((left, right))
            vocab[word] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens(["<s>"])
    for text in ("<|im_start|>", "<|im_end|>"):
        tokenizer.add_tokens([AddedToken(text, special=specials_special, normalized=False)])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)])
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "<|im_end|>", **config})


def sentencepiece(folder: Path, **config: Any) -> Path:
    """SentencePiece-like BPE with byte fallback: <unk>, <s>, </s>, 256 byte tokens, then pieces."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("▁", "a", "b", "c", "<", ">", "/", "s", "▁a", "ab", "s>"):
        vocab[piece] = len(vocab)
    # a vocabulary in which plain text could become the control token by a merge
    tokenizer = Tokenizer(
        BPE(
            vocab=vocab,
            merges=[("▁", "a"), ("a", "b"), ("s", ">"), ("<", "s>")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = NormalizerSequence([Prepend("▁"), ReplaceNormalizer(" ", "▁")])
    tokenizer.decoder = Sequence([Replace("▁", " "), ByteFallback(), Fuse(), Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return _write(folder, tokenizer, {"bos_token": "<s>", "eos_token": "</s>", **config})


def write_json(folder: Path, **files: Any) -> Path:
    """Writes `name=object` to name.json in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def _write(folder: Path, tokenizer: Tokenizer, config: dict[str, Any]) -> Path:
    return write_json(folder, tokenizer=json.loads(tokenizer.to_str()), tokenizer_config=config)
