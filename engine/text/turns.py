"""Which tokens a chat template opens and closes an assistant's turn with, found by rendering a short chat."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from engine.text.errors import TemplateError
from engine.text.template import ChatTemplate

_QUESTION, _ANSWER = "7f3a q", "7f3a a"


@dataclass(frozen=True, slots=True)
class TurnTokens:
    """Each set has one token, or none where the template writes no token in that place (or refuses the chat)."""

    start: frozenset[str] = frozenset()
    end: frozenset[str] = frozenset()


def turn_tokens(template: ChatTemplate, added: Collection[str]) -> TurnTokens:
    """`added` are the texts of the tokenizer's added tokens, special or not: fine-tuned models mark turns with either.

    Example, ChatML: the text after the answer is "<|im_end|>\\n", so the end is "<|im_end|>"; the generation prompt
    adds "<|im_start|>assistant\\n", so the start is "<|im_start|>". Mixtral's template ends a turn with "</s>" and
    opens none.
    """
    longest_first = sorted(filter(None, added), key=len, reverse=True)
    token = re.compile(r"\s*(" + ("|".join(map(re.escape, longest_first)) or r"(?!)") + ")")
    messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    try:
        closed = template.render(messages, add_generation_prompt=False)
        question = template.render(messages[:1], add_generation_prompt=False)
        prompt = template.render(messages[:1], add_generation_prompt=True)
    except TemplateError:
        return TurnTokens()
    _, answered, after = closed.rpartition(_ANSWER)
    end = token.match(after) if answered else None
    start = token.match(prompt, len(question)) if prompt.startswith(question) else None
    return TurnTokens(
        start=frozenset({start[1]} if start else ()),
        end=frozenset({end[1]} if end else ()),
    )
