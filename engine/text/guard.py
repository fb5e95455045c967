"""Special tokens in what a user wrote are text, not control.

A chat template joins control tokens and user text into one string, so a message that holds "<|im_end|>" could end its
own turn. Two parts prevent that:

- `ControlGuard.disguise` replaces, in every string of the messages, the first character of each control token by a
  stand-in: a private-use character that occurs nowhere in the messages, one for each character replaced. The template
  sees no control token whole, whatever it does with the text (strip, replace, split, concatenate), and lengths stay the
  same. A string that ends with the beginning of a control token, or begins with the end of one, has that last or first
  character replaced, so that two strings, or a string and the template's own text, cannot join into one.
- In the rendered text, what matches a control token was written by the template. `ControlGuard.encode` gives those the
  names that they have in a second tokenizer, random and so unknown to everyone, puts the user's characters back, and
  encodes the whole at once. That tokenizer differs from the first in the names of the control tokens alone; the ids of
  ordinary text, and the spaces SentencePiece writes beside a control token, are those of the first.

What stays: a template that builds a control token around a whole user string ("<|" + name + "|>") or from a piece it
cuts out of one, and control that is ordinary text to the tokenizer. Mixtral v1's "[INST]" and "[/INST]" are: they can
be forged, here as everywhere, and so can the words of engine/text/tools.py for templates without tools. Where a
template writes JSON in ASCII (`tojson` with `ensure_ascii`), a replaced character becomes the number of its stand-in.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers

from engine.text.errors import TemplateError

# Supplementary Private Use Area A: 65,534 characters
_STAND_INS = range(0xF0000, 0xFFFFE)


class ControlGuard:
    """Keeps control tokens and user text apart. `controls` maps the text of each control token to its id."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, controls: Mapping[str, int]) -> None:
        longest_first = sorted(controls, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._beginnings = frozenset(text[:end] for text in controls for end in range(1, len(text)))
        self._ends = frozenset(text[start:] for text in controls for start in range(1, len(text)))
        self._max_length = len(longest_first[0]) if controls else 0
        nonce = secrets.token_hex(16)
        self._names = {text: f"<{nonce}:{token_id}>" for text, token_id in controls.items()}
        self._renamed = tokenizers.Tokenizer.from_str(_rename(tokenizer.to_str(), self._names))

    def disguise(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None, Disguise]:
        """Copies of `messages` and `tools` without a control token in them, and how to get the characters back.

        Words that templates compare are left alone: roles (the caller sees to it that they are words), types, and the
        keys of messages, calls and functions. The keys of arguments and parameters are the user's.
        """
        disguise = Disguise(present=set().union(*_strings(messages), *_strings(tools)))
        copies = [
            {key: value if key == "role" else self._hide_field(key, value, disguise) for key, value in message.items()}
            for message in messages
        ]
        if tools is None:
            return copies, None, disguise
        return copies, [self._hide_function(tool, disguise) for tool in tools], disguise

    def encode(self, rendered: str, disguise: Disguise) -> list[int]:
        """The ids of a text rendered from disguised messages."""
        named = self._control.sub(lambda match: self._names[match[0]], rendered)
        return self._renamed.encode(disguise.lift(named), add_special_tokens=False).ids

    def _hide_field(self, key: str, value: Any, disguise: Disguise) -> Any:
        if key == "tool_calls" and value:
            return [self._hide_function(call, disguise) for call in value]
        return self._hide(value, disguise)

    def _hide_function(self, entry: Mapping[str, Any], disguise: Disguise) -> dict[str, Any]:
        """Of a tool, or of a call: {"type", "function": {"name", …}, …}."""
        copy = {}
        for key, value in entry.items():
            if key == "function" and isinstance(value, Mapping):
                copy[key] = {name: self._hide(item, disguise) for name, item in value.items()}
            else:
                copy[key] = value if key == "type" and value == "function" else self._hide(value, disguise)
        return copy

    def _hide(self, value: Any, disguise: Disguise) -> Any:
        if isinstance(value, str):
            return disguise.put_on(value, self._positions(value))
        if isinstance(value, Mapping):
            return {self._hide(key, disguise): self._hide(item, disguise) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item, disguise) for item in value]
        return value

    def _positions(self, text: str) -> set[int]:
        """Which characters to replace.

        Example: with the control token "<s>", of " >a<s>b< " the characters at 1 (an end), 3 (whole) and 7 (a
        beginning). Templates strip contents, so the edges of a text are those without white space.
        """
        positions = set()
        match = self._control.search(text)
        while match is not None:
            positions.add(match.start())
            match = self._control.search(text, match.start() + 1)  # also one that overlaps this one
        start, end = len(text) - len(text.lstrip()), len(text.rstrip())
        lengths = range(1, min(self._max_length, end - start + 1))
        if any(text[start : start + length] in self._ends for length in lengths):
            positions.add(start)
        if any(text[end - length : end] in self._beginnings for length in lengths):
            positions.add(end - 1)
        return positions


class Disguise:
    """The stand-ins of one chat. `present`: the characters of the messages, none of which may be a stand-in."""

    def __init__(self, present: set[str]) -> None:
        self._free = (char for char in map(chr, _STAND_INS) if char not in present)
        self._stand_ins: dict[str, str] = {}

    @property
    def is_empty(self) -> bool:
        """Nothing was replaced."""
        return not self._stand_ins

    def put_on(self, text: str, positions: set[int]) -> str:
        if not positions:
            return text
        chars = list(text)
        for position in positions:
            chars[position] = self._stand_in(chars[position])
        return "".join(chars)

    def lift(self, text: str) -> str:
        """`text` with the characters that the stand-ins stand for."""
        return text.translate({ord(stand_in): char for char, stand_in in self._stand_ins.items()})

    def _stand_in(self, char: str) -> str:
        if char not in self._stand_ins:
            stand_in = next(self._free, None)
            if stand_in is None:
                raise TemplateError("the messages use every private-use character of plane 15; leave some of them out")
            self._stand_ins[char] = stand_in
        return self._stand_ins[char]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _rename(tokenizer_json: str, names: Mapping[str, str]) -> str:
    """A tokenizer in which the tokens that `names` lists are called by their new names, and only by these.

    Ordinary text cannot become one of them by merges either (BPE), nor as a piece of a Unigram model.
    """
    spec = json.loads(tokenizer_json)
    for token in spec["added_tokens"]:
        if token["content"] in names:
            token["content"] = names[token["content"]]
            token["normalized"] = False
    model = spec["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:
        model["merges"] = [pair for pair in model["merges"] if names.keys().isdisjoint((*pair, "".join(pair)))]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    spec["post_processor"] = None  # adds special tokens by name, which no caller of this tokenizer asks for
    return json.dumps(spec)
