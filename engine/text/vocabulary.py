"""The bytes behind every token id.

Two kinds of vocabulary are known, told apart by the decoder of tokenizer.json (or its pre-tokenizer, when there is no
decoder):

- Byte-level BPE (decoder `ByteLevel`): every character of a token stands for one byte, by the GPT-2 alphabet below.
- SentencePiece-like (decoder `Metaspace`, or a `Replace` of "▁"): "▁" stands for a space and, with byte fallback, the
  token "<0x0A>" for the byte 0x0A; anything else stands for itself in UTF-8.

An added token (a special one, or any in a byte-level vocabulary) stands for its own text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from weights.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Token ids and their bytes. An id without a token (a padded row of the embedding) has no bytes."""

    pieces: Mapping[int, bytes]
    special_ids: frozenset[int]
    drops_leading_space: bool
    """The decoder takes one space off the front of a text: encoding put it there."""

    @classmethod
    def of(cls, spec: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> Vocabulary:
        """The vocabulary of `tokenizer`, which was made from `spec`, the object in tokenizer.json.

        Raises CheckpointError when the tokenizer is of neither kind.
        """
        added = tokenizer.get_added_tokens_decoder()
        decoders = list(_parts(spec.get("decoder"), "decoders"))
        byte_level = _is_byte_level(decoders or list(_parts(spec.get("pre_tokenizer"), "pretokenizers")))
        byte_fallback = any(part.get("type") == "ByteFallback" for part in decoders)
        pieces: dict[int, bytes] = {}
        for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id in added and (byte_level or added[token_id].special):
                pieces[token_id] = token.encode()
            elif byte_level:
                pieces[token_id] = _byte_level_bytes(token)
            else:
                pieces[token_id] = _sentencepiece_bytes(token, byte_fallback=byte_fallback)
        special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        return cls(pieces, special_ids, any(_drops_leading_space(part) for part in decoders))

    @property
    def size(self) -> int:
        """The highest id + 1."""
        return max(self.pieces, default=-1) + 1

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces.get(token_id, b"")


def _parts(component: Any, key: str) -> Iterator[Mapping[str, Any]]:
    """A component of tokenizer.json, or, for a `Sequence`, its parts (listed under `key`) in order."""
    if isinstance(component, Mapping):
        if component.get("type") == "Sequence":
            for part in component.get(key, ()):
                yield from _parts(part, key)
        else:
            yield component


def _is_byte_level(parts: list[Mapping[str, Any]]) -> bool:
    if any(part.get("type") == "ByteLevel" for part in parts):
        return True
    if any(part.get("type") == "Metaspace" or _replaces_metaspace(part) for part in parts):
        return False
    names = ", ".join(str(part.get("type")) for part in parts) or "nothing"
    raise CheckpointError(
        f"tokenizer.json: the decoder is {names}; byte-level BPE (ByteLevel) and SentencePiece-like (▁) are supported"
    )


def _replaces_metaspace(part: Mapping[str, Any]) -> bool:
    return bool(part.get("type") == "Replace" and part.get("pattern") == {"String": "▁"} and part.get("content") == " ")


def _drops_leading_space(part: Mapping[str, Any]) -> bool:
    if part.get("type") == "Metaspace":
        return bool(part.get("prepend_scheme", "always") != "never")
    return bool(part.get("type") == "Strip" and part.get("content") == " " and part.get("start", 0) > 0)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet (Radford et al. 2019, `bytes_to_unicode`): a visible character for each byte.

    Printable Latin-1 bytes are their own character; the other 68 take U+0100, U+0101, … in order: byte 0x00 is "Ā",
    the space 0x20 is "Ġ" and the newline 0x0A is "Ċ".
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # not written in the alphabet: the token is its own text
        return token.encode()


def _sentencepiece_bytes(token: str, *, byte_fallback: bool) -> bytes:
    if byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()
