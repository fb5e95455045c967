"""Bad bodies, routes, models, prompts and messages, each beside four good streams whose text must not change."""

from __future__ import annotations

from typing import Any

import pytest

from tests.server.fake_engine import VOCAB_SIZE
from tests.server.harness import Live, error_of

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def live(busy_server: Live) -> Live:
    return busy_server


def deep(opening: str, closing: str, count: int) -> bytes:
    return (opening * count + closing * count).encode()


BODIES = {
    "empty": b"",
    "blank": b"   ",
    "not JSON": b"hello",
    "cut off": b'{"prompt": "Hi"',
    "trailing comma": b'{"prompt": "Hi",}',
    "two values": b'{"prompt": "Hi"} {}',
    "a list": b"[]",
    "a string": b'"Hi"',
    "null": b"null",
    "a number": b"1",
    "invalid UTF-8": b'{"prompt": "\xff"}',
    "overlong UTF-8": b'{"prompt": "\xc0\x80"}',
    "UTF-16": '{"prompt": "Hi"}'.encode("utf-16"),
    "1,000 lists deep": b'{"prompt": "Hi", "user": ' + deep("[", "]", 1000) + b"}",
    "100,000 objects deep": deep('{"a":', "}", 100_000),
    "an integer of 5,000 digits": b'{"prompt": "Hi", "seed": ' + b"1" * 5000 + b"}",
    "NaN": b'{"prompt": "Hi", "temperature": NaN}',
    "NaN in an unknown field": b'{"prompt": "Hi", "whatever": NaN}',
    "Infinity": b'{"prompt": "Hi", "temperature": Infinity}',
    "1e400": b'{"prompt": "Hi", "temperature": 1e400}',
    "-1e400 in an unknown field": b'{"prompt": "Hi", "whatever": [{"a": -1E+400}]}',
    "400 digits and a point": b'{"prompt": "Hi", "whatever": ' + b"9" * 400 + b".0}",
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "lone low surrogate": b'{"prompt": "a\\udc00b"}',
    "surrogates the wrong way round": b'{"prompt": "\\udc00\\ud800"}',
    "lone surrogate in bytes": b'{"prompt": "\xed\xa0\x80"}',
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request(live: Live, path: str, name: str) -> None:
    response = live.client.post(path, content=BODIES[name], headers=JSON)
    assert error_of(response, 400)["code"] is None


@pytest.mark.parametrize("value", [b"NaN", b"-Infinity", b"1e400", b"[1, NaN]"])
@pytest.mark.parametrize("name", ["temperature", "expert_min_p", "expert_mask", "experts_per_token"])
def test_a_number_that_is_not_finite_is_named(live: Live, name: str, value: bytes) -> None:
    body = b'{"prompt": "Hi", "' + name.encode() + b'": ' + value + b"}"
    error = error_of(live.client.post("/v1/completions", content=body, headers=JSON), 400)
    assert error["param"] == name
    assert name in error["message"]


@pytest.mark.parametrize("body", [b'{"prompt": "\\ud83c\\udf89"}', b'{"prompt": "a\\u0000b"}', b'{"prompt": "1e400"}'])
def test_bodies_that_only_look_bad(live: Live, body: bytes) -> None:
    response = live.client.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 200, response.text


def test_a_null_character_in_a_chat_is_text(live: Live) -> None:
    live.chat(messages=[{"role": "user", "content": "a\x00b"}])


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_another_content_type(live: Live, kind: str) -> None:
    response = live.client.post("/v1/completions", content=b'{"prompt": "Hi"}', headers={"Content-Type": kind})
    error_of(response, 415)


def test_a_body_over_the_limit(live: Live) -> None:
    response = live.post("/v1/completions", {"prompt": "x" * 2**21})
    assert "2097152" in error_of(response, 413)["message"]


def test_a_chunked_body_over_the_limit(live: Live) -> None:
    body = (b"x" * 10_000 for _ in range(300))
    error_of(live.client.post("/v1/completions", content=body, headers=JSON), 413)


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/nothing", "/v1/completions/", "/health/x", "//v1/models", "/V1/models"]
)
def test_unknown_routes(live: Live, path: str) -> None:
    error_of(live.client.get(live.url + path), 404)
    error_of(live.client.post(live.url + path, json={}), 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/completions"),
        ("DELETE", "/v1/chat/completions"),
        ("POST", "/v1/models"),
        ("PUT", "/health"),
        ("POST", "/metrics"),
        ("OPTIONS", "/v1/completions"),
    ],
)
def test_wrong_methods(live: Live, method: str, path: str) -> None:
    response = live.client.request(method, path)
    error_of(response, 405)
    assert response.headers["allow"]


@pytest.mark.parametrize(
    "model", ["other", "../../etc/passwd", "org/fake-model ", "", "ORG/FAKE-MODEL", "\x00", "m" * 10_000]
)
def test_unknown_models(live: Live, model: str) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "Hi"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
    ):
        error = error_of(live.post(path, body | {"model": model}), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert len(error["message"]) < 2000


def test_an_unknown_model_is_found_before_its_other_mistakes_are_paid_for(live: Live) -> None:
    error_of(live.post("/v1/completions", {"prompt": "x " * 5000, "model": "other"}), 404)


MISSING: Any = object()


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            MISSING,
            None,
            "",
            [],
            [[]],
            [""],
            ["a", ""],
            [[1], []],
            [1, "a"],
            ["a", 1],
            [1, [2]],
            [True],
            [1.5],
            [[1.0]],
        ),
        *(1, {"a": 1}, [None], [["a"]], [[[1]]], True),
        *([-1], [VOCAB_SIZE], [2**63], [1, 2**64], [[5], [VOCAB_SIZE]], [10**4000]),
    ],
    ids=lambda prompt: "missing" if prompt is MISSING else repr(prompt)[:20],
)
def test_prompts(live: Live, prompt: Any) -> None:
    body = {} if prompt is MISSING else {"prompt": prompt}
    error = error_of(live.post("/v1/completions", body), 400)
    assert error["param"] == "prompt"
    assert "prompt" in error["message"]
    assert len(error["message"]) < 300


def test_a_long_prompt_of_one_wrong_kind_is_refused_quickly(live: Live) -> None:
    error = error_of(live.post("/v1/completions", {"prompt": [1, *["a"] * 300_000]}), 400)
    assert error["param"] == "prompt"


@pytest.mark.parametrize(
    ("body", "param", "counts"),
    [
        ({"prompt": [5] * 257}, "prompt", ("256", "257")),
        ({"prompt": [5] * 256}, "prompt", ("256",)),
        ({"prompt": "word " * 1000}, "prompt", ("256",)),
        ({"prompt": [5] * 200, "max_tokens": 57}, "max_tokens", ("256", "200", "57")),
        ({"prompt": [5], "max_tokens": 10**6}, "max_tokens", ("256", "1000000")),
        ({"prompt": [[5], [5] * 257]}, "prompt", ("256", "257")),
    ],
)
def test_over_the_context(live: Live, body: dict[str, Any], param: str, counts: tuple[str, ...]) -> None:
    before = live.call(lambda: len(live.engine.requests))
    error = error_of(live.post("/v1/completions", body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert all(count in error["message"] for count in counts)
    prompts = [request.prompt_ids for request in live.call(lambda: live.engine.requests[before:])]
    assert (5,) not in prompts, "a prompt of the refused batch was submitted"


def test_over_the_context_in_a_chat(live: Live) -> None:
    messages = [{"role": "user", "content": "word " * 1000}]
    error = error_of(live.post("/v1/chat/completions", {"messages": messages}), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


def test_exactly_the_context_is_served(live: Live) -> None:
    assert live.complete(prompt=[5] * 200, max_tokens=56, ignore_eos=True)["usage"]["total_tokens"] == 256


def user(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "messages",
    [
        *(MISSING, None, [], "Hi", {}, [1], [None], [[]], ["Hi"]),
        *([{}], [{"content": "Hi"}], [{"role": "wizard", "content": "Hi"}], [{"role": 5, "content": "Hi"}]),
        *(user(None), user(5), user([5]), user(["Hi"]), user([{"type": "text"}]), user([{"type": "text", "text": 5}])),
        user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/x.png"}}]),
        user([{"type": "text", "text": "Hi"}, {"type": "input_audio", "input_audio": {}}]),
        [{"role": "user", "content": "Hi"}, {"role": "user", "content": "again"}],  # Mixtral's template refuses it
        [{"role": "assistant", "content": "Hi"}],
        [{"role": "tool", "content": "Hi", "tool_call_id": "1"}],
        [*user("Hi"), {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}],
        user("Hi") * 10_000,
    ],
    ids=lambda messages: "missing" if messages is MISSING else repr(messages)[:30],
)
def test_messages(live: Live, messages: Any) -> None:
    body = {} if messages is MISSING else {"messages": messages}
    error = error_of(live.post("/v1/chat/completions", body), 400)
    assert error["param"] == "messages"
    assert len(error["message"]) < 1000


def test_the_place_in_a_chat_is_named(live: Live) -> None:
    error = error_of(live.post("/v1/chat/completions", {"messages": [*user("Hi"), {"role": "x", "content": ""}]}), 400)
    assert error["message"] == "messages[1].role must be one of system, developer, user, assistant, tool."
