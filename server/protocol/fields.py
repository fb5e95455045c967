"""Field types of requests: each has its interval for the OpenAPI page and says in plain words what would be right."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_MASK = 1024
"""Layers of an expert mask, and experts of a layer."""

MODEL_ID, TOKEN_ID, EXPERT_ID, EXPERT_COUNT = "Model id", "Token id", "Expert id", "Number of experts"
"""Titles of types whose limits are the model's: server/openapi.py fills them in."""


def absent(description: str, default: float | None = None) -> Any:
    """The value of a field that may be left out. `default` is what that means; it is told, and set elsewhere."""
    return Field(None, description=description, json_schema_extra=None if default is None else {"default": default})


def expect(what: str) -> WrapValidator:
    """Replaces whatever pydantic says of a value by "must be `what`"."""

    def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError:
            raise PydanticCustomError("expected", "must be {what}", {"what": what}) from None

    return WrapValidator(validate)


def check(what: str, test: Callable[[Any], bool]) -> WrapValidator:
    """Like `expect`, with one more condition that a JSON schema has no word for."""

    def validate(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            result = inner(value)
        except ValidationError:
            result = None
        if result is None or not test(result):
            raise PydanticCustomError("expected", "must be {what}", {"what": what})
        return result

    return WrapValidator(validate)


def at_most(count: int) -> BeforeValidator:
    """Refuses a longer list or object before its items are looked at: pydantic counts while it reads them."""

    def validate(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > count:
            raise PydanticCustomError("too_long", "must have at most {count} items", {"count": count})
        return value

    return BeforeValidator(validate)


def _prompt_kind(prompt: Any) -> str:
    """Which form of a prompt this is meant to be, by its first item: one form is then checked, not four."""
    if not isinstance(prompt, list):
        return "text"
    if prompt and isinstance(prompt[0], str):
        return "texts"
    return "batch" if prompt and isinstance(prompt[0], list) else "ids"


def _few_prompts(prompt: Any) -> Any:
    """Each prompt has a choice at least, so more than that cannot be answered."""
    if _prompt_kind(prompt) in ("texts", "batch") and len(prompt) > MAX_CHOICES:
        raise PydanticCustomError(
            "too_long", "must be one prompt or up to {count}, not {given}", {"count": MAX_CHOICES, "given": len(prompt)}
        )
    return prompt


def _valid_bias(bias: dict[str, float]) -> bool:
    return all(key.isascii() and key.isdigit() and len(key) < 20 for key in bias)


def _valid_mask(mask: list[int] | dict[str, list[int]]) -> bool:
    return isinstance(mask, list) or all(re.fullmatch(r"0|[1-9]\d{0,8}", layer, re.ASCII) for layer in mask)


Flag = Annotated[bool, expect("true or false")]
Text = Annotated[str, expect("a string")]
NonEmpty = Annotated[str, Field(min_length=1)]
ModelId = Annotated[str, Field(title=MODEL_ID), expect("a string")]
TokenId = Annotated[int, Field(title=TOKEN_ID, json_schema_extra={"minimum": 0})]
"""Only the vocabulary can tell whether it is one, and then says so with its size."""
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
AnyTokenIds = Annotated[list[TokenId], Field(fail_fast=True), expect("a list of token ids")]
Prompt = Annotated[
    Annotated[NonEmpty, Tag("text")]
    | Annotated[list[NonEmpty], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), Tag("texts")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True), Tag("batch")],
    Discriminator(_prompt_kind),
    expect("a non-empty string, a list of those, a non-empty list of token ids, or a list of those"),
    BeforeValidator(_few_prompts),
]
TokenCount = Annotated[int, Field(ge=0, lt=2**31), expect("an integer, 0 or more")]
PositiveCount = Annotated[int, Field(ge=1, lt=2**31), expect("an integer, 1 or more")]
NumChoices = Annotated[int, Field(ge=1, le=MAX_CHOICES), expect(f"an integer from 1 to {MAX_CHOICES}")]
Temperature = Annotated[float, Field(ge=0, le=2), expect("a number from 0 to 2")]
TopP = Annotated[float, Field(gt=0, le=1), expect("a number over 0 and up to 1")]
TopK = Annotated[int, Field(ge=-1, lt=2**31), expect("an integer: -1 or 0 for off, else 1 or more")]
MinP = Annotated[float, Field(ge=0, le=1), expect("a number from 0 to 1")]
Penalty = Annotated[float, Field(ge=-2, le=2), expect("a number from -2 to 2")]
RepetitionPenalty = Annotated[float, Field(gt=0, le=2), expect("a number over 0 and up to 2")]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), expect(f"an integer from 0 to {MAX_LOGPROBS}")]
LogitBias = Annotated[
    dict[str, Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=MAX_LOGIT_BIAS, json_schema_extra={"propertyNames": {"pattern": "^[0-9]{1,19}$"}}),
    at_most(MAX_LOGIT_BIAS),
    check(f"an object of up to {MAX_LOGIT_BIAS} token ids, each with a number from -100 to 100", _valid_bias),
]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Stop = Annotated[
    StopString | Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)],
    expect(f"a string or up to {MAX_STOP_STRINGS} strings, each of 1 to {MAX_STOP_LENGTH} characters"),
]
StopTokenIds = Annotated[
    list[Annotated[TokenId, Field(ge=0)]],
    Field(max_length=MAX_STOP_TOKEN_IDS),
    expect(f"a list of up to {MAX_STOP_TOKEN_IDS} token ids"),
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63), expect("a signed integer of 64 bits")]
Priority = Annotated[int, Field(ge=-(2**31), lt=2**31), expect("a signed integer of 32 bits")]
CacheSalt = Annotated[
    str, Field(min_length=1, max_length=MAX_STOP_LENGTH), expect(f"a string of 1 to {MAX_STOP_LENGTH} characters")
]
ExpertCount = Annotated[int, Field(ge=1, lt=2**31, title=EXPERT_COUNT), expect("an integer, 1 or more")]
ExpertIds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**31, title=EXPERT_ID)]], Field(max_length=MAX_MASK, fail_fast=True)
]
ExpertMask = Annotated[
    ExpertIds
    | Annotated[
        dict[str, ExpertIds],
        Field(max_length=MAX_MASK, json_schema_extra={"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}}),
    ],
    at_most(MAX_MASK),
    check('a list of forbidden expert ids, or an object of such lists by layer, as {"0": [3, 5]}', _valid_mask),
]
CapacityFactor = Annotated[float, Field(gt=0, allow_inf_nan=False), expect("a finite number above 0")]
