"""Scored tokens in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Iterable

from engine.text import Tokenizer
from server.choices import ScoredToken
from server.protocol.chat import ChatLogprobs, TokenLogprob, TopLogprob
from server.protocol.completion import CompletionLogprobs

_FLOOR = -9999.0
"""What OpenAI sends for a token that has no chance; minus infinity is no JSON."""


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    r"""The token as text or, when its bytes are part of a character, `bytes:\xf0\x9f`, so that no two look alike."""
    data = tokenizer.token_bytes(token_id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(tokenizer: Tokenizer, tokens: Iterable[ScoredToken], num_top: int) -> CompletionLogprobs:
    """Lists parallel to `tokens`. At each place the likeliest `num_top`, and the token itself where it is not one."""
    result: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        name = token_name(tokenizer, token.token_id)
        result["tokens"].append(name)
        result["text_offset"].append(token.offset)
        if token.logprob is None:
            result["token_logprobs"].append(None)
            result["top_logprobs"].append(None)
            continue
        logprob = max(token.logprob, _FLOOR)
        top: dict[str, float] = {}
        for token_id, value in token.top[:num_top]:
            top.setdefault(token_name(tokenizer, token_id), max(value, _FLOOR))
        top.setdefault(name, logprob)
        result["token_logprobs"].append(logprob)
        result["top_logprobs"].append(top)
    return result


def chat_logprobs(tokenizer: Tokenizer, tokens: Iterable[ScoredToken], num_top: int) -> ChatLogprobs:
    content: list[TokenLogprob] = []
    for token in tokens:
        assert token.logprob is not None, "only an echoed prompt has a token without a score"
        content.append(
            {
                **_entry(tokenizer, token.token_id, token.logprob),
                "top_logprobs": [_entry(tokenizer, *entry) for entry in token.top[:num_top]],
            }
        )
    return {"content": content, "refusal": None}


def _entry(tokenizer: Tokenizer, token_id: int, logprob: float) -> TopLogprob:
    """`bytes` are the vocabulary's own; a control token has none, for it is not part of the text."""
    data = None if tokenizer.is_special(token_id) else list(tokenizer.token_bytes(token_id))
    return {"token": token_name(tokenizer, token_id), "logprob": max(logprob, _FLOOR), "bytes": data}
