"""GrammarSpec: what a caller asks for, and its text in llguidance's dialect of Lark."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.grammar.errors import GrammarError

MAX_SOURCE_BYTES = 256 * 1024
"""Longest text of a grammar, in either form."""

_NO_FORCING = '%llguidance {"no_forcing": true}\n'
"""Where only one text can follow, its tokens are still the model's to choose."""

# Between the parts of a JSON text: nothing, a space, or a line end and its indentation. Bounded, so that a bounded
# schema has no endless answer.
_WHITE_SPACE = r"( |\n {0,16})?"

_GBNF_RULE = re.compile(r"^[^\S\n]*[\w-]+[ \t]*::=", re.MULTILINE)
_GBNF_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)", re.DOTALL)
_OPTIONS = re.compile(r"^[^\S\n]*%llguidance\b", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """`text` is a JSON schema, a regular expression, a JSON list of strings, or a grammar, by `kind`."""

    kind: Literal["json_schema", "regex", "choice", "lark"]
    text: str

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool) -> GrammarSpec:
        """JSON that is valid under `schema`. What the schema says beyond llguidance's means is refused, not ignored."""
        return cls("json_schema", json.dumps(schema, ensure_ascii=False))

    @classmethod
    def json_object(cls) -> GrammarSpec:
        """Any JSON object."""
        return cls.json_schema({"type": "object"})

    @classmethod
    def regex(cls, pattern: str) -> GrammarSpec:
        """A whole match of a regular expression, in the syntax of Rust's regex crate: no look-around, no references
        back. `\\d` is an ASCII digit."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Iterable[str]) -> GrammarSpec:
        """One of `texts`."""
        return cls("choice", json.dumps(list(texts), ensure_ascii=False))

    @classmethod
    def lark(cls, grammar: str) -> GrammarSpec:
        """llguidance's dialect of Lark, or GBNF as llama.cpp has it."""
        return cls("lark", grammar)

    def source(self) -> str:
        """The grammar as llguidance reads it. Raises GrammarError when it is longer than MAX_SOURCE_BYTES, no Unicode
        text, or GBNF that is not understood; whether it makes sense is not looked at."""
        try:
            source = self._source()
            size = len(source.encode())
        except UnicodeEncodeError:
            raise GrammarError("the grammar has half of a surrogate pair") from None
        if size > MAX_SOURCE_BYTES:
            raise GrammarError(f"the grammar is {size} bytes long, at most {MAX_SOURCE_BYTES} are taken")
        return source

    def _source(self) -> str:
        match self.kind:
            case "json_schema":
                schema = json.loads(self.text)
                if isinstance(schema, bool):
                    schema = {} if schema else {"enum": []}
                options = {"whitespace_pattern": _WHITE_SPACE}
                text = json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)
                return f"{_NO_FORCING}start: %json {text}\n"
            case "regex":
                from llguidance import regex_to_lark

                if (len(self.text) - len(self.text.rstrip("\\"))) % 2:  # regex_to_lark would leave it out
                    raise GrammarError("the regular expression ends in the middle of an escape")
                expression = regex_to_lark(self.text, use_ascii="d")
                return f"{_NO_FORCING}start: TEXT\nTEXT: /{expression}/\n"
            case "choice":
                return f"{_NO_FORCING}start: {' | '.join(map(lark_string, json.loads(self.text)))}\n"
            case "lark":
                text = _from_gbnf(self.text) if _GBNF_RULE.search(self.text) else self.text
                if _OPTIONS.search(text):
                    raise GrammarError("a grammar may not set %llguidance options")
                return _NO_FORCING + text


def lark_string(text: str) -> str:
    """`text` as a string literal of Lark: JSON's, in which DEL is escaped too."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(_GBNF_ESCAPE.sub(_character, text))).replace("%llguidance {}\n", "", 1)
    except Exception as error:  # whatever its parser raises
        reason = str(error).partition(", '")[0]  # then come the text's next characters
        raise GrammarError(f"the grammar is no GBNF: {reason}") from None


def _character(escape: re.Match[str]) -> str:
    """What is written by its code point, in a form that the converter does not spoil: it takes the zeros off."""
    digits = escape[1] or escape[2]
    if digits is None:
        return escape[0]
    code = int(digits, 16)
    return chr(code) if code >= 0x80 else f"\\x{code:02x}"
