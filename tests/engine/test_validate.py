"""engine/validate.py: every range, at its edges, and the name of what is wrong."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from engine.errors import ContextLengthError, InvalidRequestError
from engine.types import Request, SamplingParams
from engine.validate import check_request
from tests.engine.fake_core import make_info

INFO = make_info(vocab_size=100, max_model_len=16)


def make(
    prompt_ids: Any = (1, 2, 3), request_id: Any = "a", priority: Any = 0, cache_salt: Any = None, **params: Any
) -> Request:
    return Request(
        request_id=request_id,
        prompt_ids=prompt_ids,
        params=SamplingParams(**({"max_tokens": 4} | params)),
        priority=priority,
        cache_salt=cache_salt,
    )


GOOD: list[dict[str, Any]] = [
    {},
    {"prompt_ids": (0, 99)},
    {"max_tokens": None},
    {"max_tokens": 1},
    {"max_tokens": 13},
    {"max_tokens": 0, "prompt_logprobs": 0},
    {"temperature": 0},
    {"temperature": 2},
    {"top_p": 1},
    {"top_p": 1e-9},
    {"top_k": -1},
    {"top_k": 0},
    {"top_k": 1},
    {"top_k": 10**9},
    {"min_p": 0},
    {"min_p": 1},
    {"presence_penalty": -2, "frequency_penalty": 2},
    {"presence_penalty": 2.0, "frequency_penalty": -2.0},
    {"repetition_penalty": 2},
    {"repetition_penalty": 1e-9},
    {"logit_bias": ((0, -100), (99, 100.0))},
    {"logit_bias": tuple((i % 100, 0.5) for i in range(300))},
    {"seed": -(2**63)},
    {"seed": 2**63 - 1},
    {"choice": 127},
    {"logprobs": 0, "prompt_logprobs": 20},
    {"logprobs": 20, "prompt_logprobs": 0},
    {"stop": ("a", "\x00", "é", "x" * 1024)},
    {"stop_token_ids": (0, 99) * 64},
    {"min_tokens": 4},
    {"min_tokens": 13, "max_tokens": None},
    {"priority": -(2**63)},
    {"cache_salt": "salt"},
]


@pytest.mark.parametrize("fields", GOOD, ids=str)
def test_good(fields: dict[str, Any]) -> None:
    check_request(make(**fields), INFO)


NOT_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, True, "1", None, 10**5000]
BAD: list[tuple[str, Any]] = [
    *[("prompt_ids", ids) for ids in [(), (1, "a"), (True,), (1.5,), (-1,), (100,), (1, 2**63), (10**5000,), (None,)]],
    *[("max_tokens", value) for value in (-1, True, "5", 1.0, 0)],
    *[("min_tokens", value) for value in (-1, 5, True, 1.0, 2**63)],
    *[("temperature", value) for value in (-1, -1e-9, 2.1, *NOT_NUMBERS)],
    *[("top_p", value) for value in (0, 1.1, -0.1, *NOT_NUMBERS)],
    *[("top_k", value) for value in (-2, -5, 1.0, True, "1", 2**63)],
    *[("min_p", value) for value in (-0.1, 1.1, *NOT_NUMBERS)],
    *[("presence_penalty", value) for value in (-2.1, 2.1, *NOT_NUMBERS)],
    *[("frequency_penalty", value) for value in (-2.1, 2.1, *NOT_NUMBERS)],
    *[("repetition_penalty", value) for value in (0, 2.1, -1, *NOT_NUMBERS)],
    *[("logit_bias", ((token, 1),)) for token in (-1, 100, "1", True, 2**63)],
    *[("logit_bias", ((1, bias),)) for bias in (-100.1, 101, *NOT_NUMBERS)],
    ("logit_bias", tuple((i % 100, 0.5) for i in range(301))),
    *[("seed", value) for value in (2**63, -(2**63) - 1, 2**64, 1.5, True)],
    *[("choice", value) for value in (-1, True, 2**31)],
    *[("logprobs", value) for value in (-1, 21, 10**9, True, 1.0)],
    *[("prompt_logprobs", value) for value in (-1, 21, 10**9, True, 1.0)],
    *[("stop", value) for value in (("a",) * 5, ("",), ("x" * 1025,), ("é" * 513,), ("\ud800",), (1,))],
    *[("stop_token_ids", value) for value in ((-1,), (100,), (True,), ("1",), (1,) * 257)],
    *[(name, 1) for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")],
    *[("priority", value) for value in (2**63, -(2**63) - 1, True, 1.0)],
    *[("cache_salt", value) for value in ("", "\ud800", "x" * 1025, 5)],
    *[("request_id", value) for value in ("", "\ud800", "x" * 1025, 5, None)],
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=[f"{name}-{i}" for i, (name, _) in enumerate(BAD)])
def test_bad(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_request(make(**{name: value}), INFO)
    assert caught.value.param == ("prompt" if name == "prompt_ids" else name)
    assert caught.value.code is None
    assert str(caught.value).startswith(caught.value.param or "?")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_every_parameter_is_checked() -> None:
    """A field that is new in SamplingParams needs a range here."""
    assert {name for name, _ in BAD} >= set(SamplingParams.__slots__)


TOO_LONG: list[tuple[int, dict[str, Any], str, list[int]]] = [
    (16, {"max_tokens": 1}, "prompt", [16]),
    (16, {"max_tokens": None}, "prompt", [16]),
    (17, {"max_tokens": 0, "prompt_logprobs": 1}, "prompt", [16, 17]),
    (40, {"max_tokens": 1}, "prompt", [16, 40]),
    (15, {"max_tokens": 2}, "max_tokens", [16, 15, 2]),
    (1, {"max_tokens": 16}, "max_tokens", [16, 1]),
    (1, {"max_tokens": 10**18}, "max_tokens", [16, 1, 10**18]),
    (12, {"max_tokens": None, "min_tokens": 5}, "min_tokens", [16, 12, 5]),
]


@pytest.mark.parametrize(("num_prompt", "params", "param", "counts"), TOO_LONG)
def test_over_the_context(num_prompt: int, params: dict[str, Any], param: str, counts: list[int]) -> None:
    with pytest.raises(ContextLengthError) as caught:
        check_request(make((5,) * num_prompt, **params), INFO)
    assert caught.value.param == param
    assert caught.value.code == "context_length_exceeded"
    for count in counts:
        assert f" {count} " in str(caught.value).replace(";", " ")


def test_up_to_the_context() -> None:
    check_request(make((5,) * 16, max_tokens=0, prompt_logprobs=1), INFO)
    check_request(make((5,) * 15, max_tokens=1), INFO)
    check_request(make((5,) * 15, max_tokens=None), INFO)


def test_the_last_id_of_a_long_prompt_is_checked() -> None:
    info = replace(INFO, max_model_len=100_000)
    check_request(make((99,) * 50_000), info)
    with pytest.raises(InvalidRequestError, match="from 0 to 99, not 100"):
        check_request(make((99,) * 50_000 + (100,)), info)
