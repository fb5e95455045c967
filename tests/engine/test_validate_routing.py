"""What a request may not ask of routing, by the name of the field in the HTTP contract."""

from __future__ import annotations

import math
from typing import Any

import pytest

from engine import validate_routing
from engine.errors import InvalidRequestError
from engine.types import Request, SamplingParams, Steering
from engine.validate import check_request
from tests.engine.infos import engine_info

INFO = engine_info(num_layers=3, num_experts=4, max_experts_per_tok=4)


def check(*, max_tokens: int | None = 4, num_prompt: int = 3, info: Any = INFO, **fields: Any) -> None:
    params = SamplingParams(max_tokens=max_tokens)
    check_request(Request(request_id="a", prompt_ids=(1,) * num_prompt, params=params, **fields), info)


def refused(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check(**fields)
    assert "\n" not in str(caught.value)
    return caught.value


GOOD = [
    Steering(),
    Steering(experts_per_token=1),
    Steering(experts_per_token=4),
    Steering(min_p=0),
    Steering(min_p=1),
    Steering(min_p=1.0),
    Steering(min_p=1e-300),
    Steering(forbidden=((None, ()), (0, ()))),
    Steering(forbidden=((None, (0, 1, 2)),)),
    Steering(forbidden=((0, (0, 1, 2)), (1, (1, 2, 3)), (2, (3, 3, 3)))),
    Steering(forbidden=((None, (0,)), (2, (1, 2))), experts_per_token=4, min_p=0.5),
]


@pytest.mark.parametrize("steering", GOOD, ids=str)
def test_good(steering: Steering) -> None:
    check(steering=steering)


BAD: list[tuple[str, Any, str]] = [
    ("experts_per_token", 0, "from 1 to 4, not 0"),
    ("experts_per_token", 5, "not 5"),
    ("experts_per_token", -1, "not -1"),
    ("experts_per_token", True, "not True"),
    ("experts_per_token", 2.0, r"not 2\.0"),
    ("experts_per_token", math.nan, "not nan"),
    ("experts_per_token", "2", "not '2'"),
    ("experts_per_token", 2**70, "experts_per_token"),
    ("min_p", math.nan, "from 0 to 1, not nan"),
    ("min_p", math.inf, "not inf"),
    ("min_p", -0.01, "not -0.01"),
    ("min_p", 1.01, "not 1.01"),
    ("min_p", True, "not True"),
    ("min_p", None, "not None"),
    ("min_p", "0.5", "not '0.5'"),
    ("forbidden", ((None, (4,)),), "expert 4; the model has experts 0 to 3"),
    ("forbidden", ((1, (-1,)),), "expert -1"),
    ("forbidden", ((1, (True,)),), "expert True"),
    ("forbidden", ((1, (1.0,)),), r"expert 1\.0"),
    ("forbidden", ((1, ("1",)),), "expert '1'"),
    ("forbidden", ((3, (0,)),), "layer 3; the model has layers 0 to 2"),
    ("forbidden", ((-1, (0,)),), "layer -1"),
    ("forbidden", ((True, (0,)),), "layer True"),
    ("forbidden", (("0", (0,)),), "layer '0'"),
    ("forbidden", ((None, (0, 1, 2, 3)),), "every expert of layer 0"),
    ("forbidden", ((2, (3, 2, 1, 0)),), "every expert of layer 2"),
    ("forbidden", ((None, (0, 1)), (1, (2,)), (1, (3,))), "every expert of layer 1"),
]
NAMES = {"min_p": "expert_min_p", "forbidden": "expert_mask"}


@pytest.mark.parametrize(("field", "value", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_steering(field: str, value: Any, message: str) -> None:
    error = refused(steering=Steering(**{field: value}))
    assert error.param == NAMES.get(field, field)
    assert str(error).startswith(str(error.param))
    with pytest.raises(InvalidRequestError, match=message):
        raise error


def test_the_router_says_how_many_experts_a_request_may_ask_for() -> None:
    switch = engine_info(num_experts=4, max_experts_per_tok=1, num_experts_per_tok=1)
    check(steering=Steering(experts_per_token=1), info=switch)
    assert refused(steering=Steering(experts_per_token=2), info=switch).param == "experts_per_token"


@pytest.mark.parametrize(("field", "param"), [("trace_routing", "routing"), ("trace_prompt_routing", "routing_prompt")])
def test_a_trace_needs_a_record(field: str, param: str) -> None:
    unrecorded = engine_info(record_routing=False)
    check(info=unrecorded)
    check(info=unrecorded, steering=Steering(experts_per_token=1))
    error = refused(info=unrecorded, **{field: True})
    assert error.param == param
    assert "does not record routing" in str(error)


@pytest.mark.parametrize(("field", "param"), [("trace_routing", "routing"), ("trace_prompt_routing", "routing_prompt")])
@pytest.mark.parametrize("value", [1, 0, None, "true"])
def test_a_trace_is_asked_for_with_true(field: str, param: str, value: Any) -> None:
    """Anything else would not get through to the engine's process."""
    assert refused(**{field: value}).param == param


def test_a_trace_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of two experts: 60 places are ten tokens."""
    monkeypatch.setattr(validate_routing, "MAX_TRACED_PLACES", 65)
    check(max_tokens=10, trace_routing=True)
    error = refused(max_tokens=11, trace_routing=True)
    assert error.param == "routing"
    assert "11 tokens is over this model's limit of 10" in str(error)
    check(max_tokens=10, num_prompt=54, trace_routing=True)
    check(max_tokens=40, num_prompt=10, trace_prompt_routing=True)
    assert refused(num_prompt=11, trace_prompt_routing=True).param == "routing_prompt"
    check(max_tokens=7, num_prompt=3, trace_routing=True, trace_prompt_routing=True)
    assert refused(max_tokens=8, num_prompt=3, trace_routing=True, trace_prompt_routing=True).param == "routing"
    check(max_tokens=20, trace_routing=True, steering=Steering(experts_per_token=1))
    refused(max_tokens=6, trace_routing=True, steering=Steering(experts_per_token=4))
    check(max_tokens=None, num_prompt=54, trace_routing=True)
    refused(max_tokens=None, num_prompt=53, trace_routing=True)


def test_a_mask_names_so_many_experts_at_most() -> None:
    info_sized = tuple((None, (0,)) for _ in range(10_000))
    assert refused(steering=Steering(forbidden=info_sized)).param == "expert_mask"
