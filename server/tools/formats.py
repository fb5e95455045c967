"""The two ways of writing calls, and which one a model was taught.

A marker such as [TOOL_CALLS] is one control token in some vocabularies, which has no text in an answer, and ordinary
text in others. As a control token it gets a sign in the text of the answer: one of the characters from U+FDD0, which
Unicode keeps for use inside programs. Then only the token is a marker, and the same letters written out are text; only
where the words that describe the tools are ours (engine/text/tools.py) are both.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from engine.text import Tokenizer
from engine.text.tools import ToolFormat
from server.config import ToolCallParser
from server.tools import readers

_SIGNS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_LETTERS = string.ascii_letters + string.digits


@dataclass(frozen=True, slots=True)
class CallFormat:
    """One way of writing calls, in one vocabulary."""

    name: ToolFormat
    marker: str
    """What begins a call, as text."""
    opening: Sequence[str]
    """The marker in the text of an answer: its sign, or its text, or either."""
    read: Callable[[readers.Calls], Generator[None, str, None]]
    """The reader of what follows."""
    new_id: Callable[[], str]
    control_ids: Mapping[str, int]
    """The markers that are only a marker as a control token."""
    marks: Mapping[int, str]
    """The signs of control tokens, by id."""
    signs: Mapping[str, str]
    """The text of control tokens, by sign."""


def call_format(choice: ToolCallParser, tokenizer: Tokenizer) -> CallFormat:
    """The format that `choice` names; with "auto", the one that the chat template was written for."""
    name: ToolFormat = tokenizer.tool_format if choice == "auto" else choice
    markers = ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]") if name == "mistral" else ("<tool_call>", "</tool_call>")
    control: dict[str, int] = {}
    for marker in markers:
        if (token_id := tokenizer.added_id(marker)) is not None and tokenizer.is_special(token_id):
            control[marker] = token_id
    sign_of = dict(zip(control, _SIGNS, strict=False))

    def forms(marker: str) -> tuple[str, ...]:
        if marker not in control:
            return (marker,)
        return (sign_of[marker],) if tokenizer.describes_tools else (sign_of[marker], marker)

    if name == "mistral":
        read = partial(readers.read_mistral, id_signs=forms("[CALL_ID]"), argument_signs=forms("[ARGS]"))
    else:
        read = partial(readers.read_hermes, closing_signs=forms("</tool_call>"))
    return CallFormat(
        name=name,
        marker=markers[0],
        opening=forms(markers[0]),
        read=read,
        new_id=_mistral_id if name == "mistral" else _openai_id,
        control_ids=control if tokenizer.describes_tools else {},
        marks={token_id: sign_of[marker] for marker, token_id in control.items()},
        signs={sign: marker for marker, sign in sign_of.items()},
    )


def _mistral_id() -> str:
    """Nine letters and digits: Mistral's templates refuse any other."""
    return "".join(secrets.choice(_LETTERS) for _ in range(9))


def _openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"
