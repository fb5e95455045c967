"""Tokenizers in which the markers of calls are control tokens, and in which they are text."""

from __future__ import annotations

from pathlib import Path

from engine.text import Tokenizer
from tests.engine.text.checkpoints import (
    CHATML,
    HERMES_MARKERS,
    HERMES_TOOLS,
    MISTRAL_MARKERS,
    MISTRAL_TOOLS,
    byte_level,
)

KINDS = ("mistral", "mistral text", "hermes", "hermes text")


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    """With markers as control tokens, unless the kind says that they are text.

    "none" has a template without tools, and a vocabulary with <tool_call> as a control token.
    """
    markers = (*MISTRAL_MARKERS, "[ARGS]", "[CALL_ID]") if kind.startswith("mistral") else HERMES_MARKERS
    added = {"</s>": True} | ({} if kind.endswith("text") else dict.fromkeys(markers, True))
    template = MISTRAL_TOOLS if kind.startswith("mistral") else CHATML if kind == "none" else HERMES_TOOLS
    return Tokenizer.load(byte_level(folder, added=added, eos_token="</s>", chat_template=template))
