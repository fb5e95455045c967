"""What a request must be before the engine takes it. Behind this check nothing of a request is looked at again."""

from __future__ import annotations

from engine.errors import ContextLengthError, InvalidRequestError
from engine.grammar.spec import MAX_SOURCE_BYTES
from engine.types import EngineInfo, Request, SamplingParams
from engine.validate_routing import check_routing

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 4
MAX_STOP_BYTES = 1024
MAX_STOP_TOKEN_IDS = 256
"""Twice what a client may send (server/protocol/fields.py): the tokenizer's end-of-sequence ids come on top."""
MAX_LOGIT_BIAS = 300
MAX_NAME_BYTES = 1024
"""Longest request id and cache salt."""

_INT64 = range(-(2**63), 2**63)


def check_request(request: Request, info: EngineInfo) -> None:
    """Raise unless an engine that says `info` of itself can serve `request`.

    InvalidRequestError names the field at fault in `param` (a field of SamplingParams, "prompt", or one of Request);
    ContextLengthError, when prompt and max_tokens do not fit `info.max_model_len`, has both counts in its message.
    Numbers must be Python's own, and token ids ints, not bools: that is also what the way to the engine carries.
    """
    _check_text("request_id", request.request_id, MAX_NAME_BYTES)
    _check_prompt(request.prompt_ids, info.vocab_size)
    _check_params(request.params, info.vocab_size)
    _check_length(len(request.prompt_ids), request.params, info.max_model_len)
    _check_int("priority", request.priority, _INT64)
    if request.cache_salt is not None:
        _check_text("cache_salt", request.cache_salt, MAX_NAME_BYTES)
    if request.grammar is not None:
        _check_text("grammar", request.grammar, MAX_SOURCE_BYTES)
    check_routing(request, info)


def _check_prompt(prompt_ids: tuple[int, ...], vocab_size: int) -> None:
    if not prompt_ids:
        raise InvalidRequestError("prompt must hold at least one token", param="prompt")
    # The built-ins are some ten times faster than a loop here, and a prompt may be long.
    if set(map(type, prompt_ids)) != {int} or min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
        _check_token_ids("prompt", prompt_ids, vocab_size)


def _check_length(num_prompt: int, params: SamplingParams, max_model_len: int) -> None:
    num_new = params.max_tokens
    if num_prompt > max_model_len or (num_prompt == max_model_len and num_new != 0):
        raise ContextLengthError(
            f"the context is {max_model_len} tokens long and the prompt has {num_prompt}; shorten the prompt",
            param="prompt",
        )
    if num_new is not None and num_prompt + num_new > max_model_len:
        raise ContextLengthError(
            f"the context is {max_model_len} tokens long, the prompt has {num_prompt} and max_tokens asks for "
            f"{num_new} more; shorten the prompt or lower max_tokens",
            param="max_tokens",
        )
    if num_prompt + params.min_tokens > max_model_len:
        raise ContextLengthError(
            f"the context is {max_model_len} tokens long, the prompt has {num_prompt} and min_tokens asks for "
            f"{params.min_tokens} more; shorten the prompt or lower min_tokens",
            param="min_tokens",
        )


def _check_params(params: SamplingParams, vocab_size: int) -> None:
    _check_number("temperature", params.temperature, 0, 2)
    _check_number("top_p", params.top_p, 0, 1, above=True)
    _check_int("top_k", params.top_k, range(-1, 2**63))
    _check_number("min_p", params.min_p, 0, 1)
    _check_number("presence_penalty", params.presence_penalty, -2, 2)
    _check_number("frequency_penalty", params.frequency_penalty, -2, 2)
    _check_number("repetition_penalty", params.repetition_penalty, 0, 2, above=True)
    _check_logit_bias(params.logit_bias, vocab_size)
    _check_max_tokens(params)
    _check_int("choice", params.choice, range(2**31))
    if params.seed is not None:
        _check_int("seed", params.seed, _INT64)
    if params.logprobs is not None:
        _check_int("logprobs", params.logprobs, range(MAX_LOGPROBS + 1))
    if params.prompt_logprobs is not None:
        _check_int("prompt_logprobs", params.prompt_logprobs, range(MAX_LOGPROBS + 1))
    _check_count("stop", len(params.stop), MAX_STOP_STRINGS)
    for text in params.stop:
        _check_text("stop", text, MAX_STOP_BYTES)
    _check_count("stop_token_ids", len(params.stop_token_ids), MAX_STOP_TOKEN_IDS)
    _check_token_ids("stop_token_ids", params.stop_token_ids, vocab_size)
    for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
        if type(getattr(params, name)) is not bool:
            raise InvalidRequestError(f"{name} must be true or false, not {_show(getattr(params, name))}", param=name)


def _check_max_tokens(params: SamplingParams) -> None:
    _check_int("min_tokens", params.min_tokens, range(2**63))
    if params.max_tokens is None:
        return
    _check_int("max_tokens", params.max_tokens, range(2**63))
    if params.max_tokens == 0 and params.prompt_logprobs is None:
        raise InvalidRequestError(
            "max_tokens must be at least 1; 0 only scores a prompt, with prompt_logprobs", param="max_tokens"
        )
    if params.min_tokens > params.max_tokens:
        raise InvalidRequestError(
            f"min_tokens must be at most max_tokens ({params.max_tokens}), not {params.min_tokens}", param="min_tokens"
        )


def _check_logit_bias(logit_bias: tuple[tuple[int, float], ...], vocab_size: int) -> None:
    _check_count("logit_bias", len(logit_bias), MAX_LOGIT_BIAS)
    _check_token_ids("logit_bias", tuple(token_id for token_id, _ in logit_bias), vocab_size)
    for _, bias in logit_bias:
        _check_number("logit_bias", bias, -100, 100)


def _check_token_ids(name: str, token_ids: tuple[int, ...], vocab_size: int) -> None:
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{name} must hold token ids, integers from 0 to {vocab_size - 1}, not {_show(token_id)}", param=name
            )


def _check_number(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    """Between `low` and `high`, and with `above` not `low` itself. NaN is in no range."""
    if type(value) not in (int, float) or not low <= value <= high or (above and value == low):
        bounds = f"above {low} and at most {high}" if above else f"from {low} to {high}"
        raise InvalidRequestError(f"{name} must be a number {bounds}, not {_show(value)}", param=name)


def _check_int(name: str, value: int, allowed: range) -> None:
    if type(value) is not int or value not in allowed:
        raise InvalidRequestError(
            f"{name} must be an integer from {allowed[0]} to {allowed[-1]}, not {_show(value)}", param=name
        )


def _check_count(name: str, count: int, most: int) -> None:
    if count > most:
        raise InvalidRequestError(f"{name} must have at most {most} entries, not {count}", param=name)


def _check_text(name: str, text: str, max_bytes: int) -> None:
    """Not empty, not long, and text: a lone surrogate has no bytes."""
    if type(text) is not str or not text:
        raise InvalidRequestError(f"{name} must be a string and not empty", param=name)
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(f"{name} must be valid Unicode, without lone surrogates", param=name) from None
    if num_bytes > max_bytes:
        raise InvalidRequestError(f"{name} must be at most {max_bytes} bytes long, not {num_bytes}", param=name)


def _show(value: object) -> str:
    """`value` for a one-line message, cut short; an integer may be too long to print at all."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
