"""Text to tokens and back: tokenizer, chat template, incremental detokenizer and stop strings. Imports no torch."""

from engine.text.detokenizer import NO_MARKS, Detokenizer
from engine.text.eos import stop_reason, with_eos_ids
from engine.text.errors import TemplateError
from engine.text.grammar import grammar_vocabulary
from engine.text.stream import TextDelta, TextStream
from engine.text.tokenizer import Tokenizer

__all__ = [
    "NO_MARKS",
    "Detokenizer",
    "TemplateError",
    "TextDelta",
    "TextStream",
    "Tokenizer",
    "grammar_vocabulary",
    "stop_reason",
    "with_eos_ids",
]
