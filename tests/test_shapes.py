"""The checker of responses can fail: each key, each type and each rule of a stream is broken once."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import httpx
import httpx2
import openai
import pytest

from tests.checked_responses import check_response, check_response_of_some_path, checked_responses
from tests.shape_checks import check, check_stream

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TRACE = {"experts": [[0, 1], [2, 3]], "weights": [[0.5, 0.5], [1, 0]], "entropy": [0.1, 0.2]}
COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 1_760_000_000,
    "model": "tiny",
    "choices": [
        {
            "index": 0,
            "text": "ab",
            "logprobs": {
                "tokens": ["a", "b"],
                "token_logprobs": [None, -0.5],
                "top_logprobs": [None, {"b": -0.5, "c": -1}],
                "text_offset": [0, 1],
            },
            "finish_reason": "stop",
            "routing": {"prompt": [TRACE], "tokens": [TRACE]},
        }
    ],
    "usage": USAGE | {"prompt_tokens_details": {"cached_tokens": 2}, "active_params_per_token": 100},
}
ENTRY = {"token": "a", "logprob": -0.5, "bytes": [97]}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_760_000_000,
    "model": "tiny",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "a", "refusal": None},
            "logprobs": {"content": [ENTRY | {"top_logprobs": [ENTRY, ENTRY | {"bytes": None}]}], "refusal": None},
            "finish_reason": "length",
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": None, "refusal": None, "tool_calls": [CALL]},
            "logprobs": None,
            "finish_reason": "tool_calls",
        },
    ],
    "usage": USAGE,
}
ERROR = {"error": {"message": "No.", "type": "invalid_request_error", "param": "n", "code": None}}
MODEL = {"id": "tiny", "object": "model", "created": 1_760_000_000, "owned_by": "mixserve", "max_model_len": 64}
SAMPLES: list[tuple[str, int, Any]] = [
    ("/v1/completions", 200, COMPLETION),
    ("/v1/chat/completions", 200, CHAT),
    ("/v1/models", 200, {"object": "list", "data": [MODEL | {"routing_simulation": "even"}]}),
    ("/v1/models/org/tiny", 200, MODEL),
    ("/tokenize", 200, {"count": 1, "max_model_len": 64, "tokens": [5], "token_strs": ["a"]}),
    ("/detokenize", 200, {"prompt": ""}),
    ("/health", 200, {"status": "ok"}),
    ("/ready", 200, {"status": "ready"}),
    ("/version", 200, {"version": "0.1.0"}),
    ("/v1/experts/reset", 200, {"status": "reset"}),
    ("/v1/completions", 400, ERROR),
    ("/anything", 503, {"error": ERROR["error"] | {"type": "server_error", "code": "server_overloaded"}}),
]
PATHS = [(sample[0], sample[1]) for sample in SAMPLES]


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, as the keys that lead to it."""
    yield where
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*where, key))


def at(value: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        value = value[key]
    return value


OPTIONAL = {"prompt_tokens_details", "active_params_per_token", "routing", "routing_simulation"}


@pytest.mark.parametrize(("path", "status", "body"), SAMPLES, ids=map(str, PATHS))
def test_a_key_more_or_less_or_another_type(path: str, status: int, body: Any) -> None:
    check(path, status, body)
    allowed = []
    for where in places(body):
        for change in (_more, _less, _other):
            changed = copy.deepcopy(body)
            if change(changed, where, path):
                try:
                    check(path, status, changed)
                except AssertionError:
                    continue
                allowed.append((change.__name__, where))
    assert allowed == []


def _more(body: Any, where: tuple[Any, ...], path: str) -> bool:
    target = at(body, where)
    if not isinstance(target, dict) or (path == "/v1/completions" and where[-2:-1] == ("top_logprobs",)):
        return False
    target["stop_sequence"] = None
    return True


def _less(body: Any, where: tuple[Any, ...], _: str) -> bool:
    if not where or isinstance(where[-1], int) or where[-1] in OPTIONAL:
        return False
    if where[-2:-1] == ("routing",) or (len(where) > 2 and where[-3] == "top_logprobs" and where[-1] in "abc"):
        return False
    del at(body, where[:-1])[where[-1]]
    return True


def _other(body: Any, where: tuple[Any, ...], _: str) -> bool:
    """True is no number, 1.5 no list, object or string."""
    if not where:
        return False
    at(body, where[:-1])[where[-1]] = True if type(at(body, where)) in (int, float) else 1.5
    return True


BROKEN: list[tuple[str, Any, tuple[Any, ...], Any]] = [
    ("/v1/completions", COMPLETION, ("choices", 0, "finish_reason"), None),
    ("/v1/completions", COMPLETION, ("choices", 0, "finish_reason"), "tool_calls"),
    ("/v1/completions", COMPLETION, ("choices", 0, "finish_reason"), "eos"),
    ("/v1/completions", COMPLETION, ("choices", 0, "index"), 1),
    ("/v1/completions", COMPLETION, ("choices",), []),
    ("/v1/completions", COMPLETION, ("choices", 0, "logprobs", "tokens"), ["a"]),
    ("/v1/completions", COMPLETION, ("choices", 0, "logprobs", "token_logprobs"), [None, None]),
    ("/v1/completions", COMPLETION, ("choices", 0, "logprobs", "token_logprobs"), [-0.5, -0.5]),
    ("/v1/completions", COMPLETION, ("choices", 0, "logprobs", "token_logprobs"), [None, 0.5]),
    ("/v1/completions", COMPLETION, ("choices", 0, "logprobs", "token_logprobs"), [None, -99999]),
    ("/v1/completions", COMPLETION, ("choices", 0, "logprobs", "text_offset"), [1, 0]),
    ("/v1/completions", COMPLETION, ("choices", 0, "routing", "tokens", 0, "entropy"), [0.1]),
    ("/v1/completions", COMPLETION, ("usage", "total_tokens"), 6),
    ("/v1/completions", COMPLETION, ("usage", "prompt_tokens_details", "cached_tokens"), 4),
    ("/v1/completions", COMPLETION, ("usage",), None),
    ("/v1/completions", COMPLETION, ("created",), 1_760_000_000_000),
    ("/v1/completions", COMPLETION, ("id",), "chatcmpl-1"),
    ("/v1/chat/completions", CHAT, ("choices", 0, "message", "content"), None),
    ("/v1/chat/completions", CHAT, ("choices", 0, "message", "tool_calls"), []),
    ("/v1/chat/completions", CHAT, ("choices", 0, "finish_reason"), "tool_calls"),
    ("/v1/chat/completions", CHAT, ("choices", 1, "message", "tool_calls"), [CALL, CALL]),
    ("/v1/chat/completions", CHAT, ("choices", 1, "message", "role"), "tool"),
    ("/v1/chat/completions", CHAT, ("choices", 0, "logprobs", "content", 0, "bytes"), [256]),
    ("/v1/models/tiny", MODEL, ("id",), ""),
]


@pytest.mark.parametrize(("path", "body", "where", "value"), BROKEN)
def test_rules_of_whole_answers(path: str, body: Any, where: tuple[Any, ...], value: Any) -> None:
    changed = copy.deepcopy(body)
    at(changed, where[:-1])[where[-1]] = value
    with pytest.raises(AssertionError):
        check(path, 200, changed)


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (500, {}),
        (200, {}),
        (400, {"type": "server_error"}),
        (400, {"type": "rate_limit_error"}),
        (429, {}),
        (400, {"code": 400}),
        (400, {"code": "model_not_found"}),
        (404, {"code": "no_such_code"}),
        (400, {"message": "two\nlines"}),
        (400, {"message": ""}),
        (422, {"detail": []}),
    ],
)
def test_rules_of_errors(status: int, fields: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        check("/v1/completions", status, {"error": ERROR["error"] | fields})


def test_an_unknown_path_has_no_shape() -> None:
    with pytest.raises(AssertionError, match="no shape"):
        check("/v1/embeddings", 200, {})


def text_chunks() -> list[dict[str, Any]]:
    """Two choices, with usage."""
    head: dict[str, Any] = {key: COMPLETION[key] for key in ("id", "object", "created", "model")}
    lists = {"tokens": ["a"], "token_logprobs": [-1], "top_logprobs": [{"a": -1}], "text_offset": [4]}
    choices: list[dict[str, Any]] = [
        {"index": 0, "text": "a", "logprobs": lists, "finish_reason": None},
        {"index": 1, "text": "a", "logprobs": None, "finish_reason": None},
        {"index": 0, "text": "b", "logprobs": lists | {"text_offset": [5]}, "finish_reason": None},
        {"index": 1, "text": "", "logprobs": None, "finish_reason": "length"},
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"},
    ]
    chunks = [head | {"choices": [choice], "usage": None} for choice in choices]
    return copy.deepcopy([*chunks, head | {"choices": [], "usage": USAGE}])


def chat_chunks() -> list[dict[str, Any]]:
    """Text, then two tool calls."""
    head: dict[str, Any] = {key: CHAT[key] for key in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

    def call(index: int, arguments: str, *, begins: bool = False) -> dict[str, Any]:
        first: dict[str, Any] = {"id": f"call_{index}", "type": "function"} if begins else {}
        function = {"name": "f", "arguments": arguments} if begins else {"arguments": arguments}
        return {"tool_calls": [{"index": index} | first | {"function": function}]}

    deltas: list[dict[str, Any]] = [
        {"role": "assistant", "content": ""},
        {"content": "a"},
        call(0, "", begins=True),
        call(0, "{}"),
        call(1, "", begins=True),
        call(1, "{"),
        call(1, "}"),
        {},
    ]
    choices: list[dict[str, Any]]
    choices = [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None} for delta in deltas]
    choices[-1]["finish_reason"] = "tool_calls"
    return copy.deepcopy([head | {"choices": [choice]} for choice in choices])


def events(chunks: list[dict[str, Any]]) -> list[str]:
    return [*map(json.dumps, chunks), "[DONE]"]


TEXT, TALK = "/v1/completions", "/v1/chat/completions"
FAILED = json.dumps({"error": ERROR["error"] | {"type": "server_error"}})


def test_good_streams() -> None:
    check_stream(TEXT, events(text_chunks()))
    check_stream(TALK, events(chat_chunks()))
    check_stream(TEXT, [*events(text_chunks())[:2], FAILED])
    check_stream(TEXT, events(text_chunks())[:2], whole=False)
    check_stream(TEXT, [], whole=False)
    check_stream(TALK, events(chat_chunks()[:2] + chat_chunks()[-1:])[:-2], whole=False)


def _set(number: int, *where: Any, value: Any) -> Callable[[list[Any]], None]:
    def change(chunks: list[Any]) -> None:
        at(chunks[number], where[:-1])[where[-1]] = value

    return change


def _drop(number: int, *where: Any) -> Callable[[list[Any]], None]:
    def change(chunks: list[Any]) -> None:
        del at(chunks, (number, *where[:-1]) if where else ())[where[-1] if where else number]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set(1, "id", value="cmpl-2"), "differ in id"),
        (_set(1, "created", value=1_760_000_001), "differ in created"),
        (_drop(1, "usage"), "usage in some chunks only"),
        (_set(1, "usage", value=USAGE), "choices beside the usage"),
        (_drop(5), "no usage at the end"),
        (_drop(0, "choices", 0), "assert 0 == 1|.*choices"),
        (_set(0, "choices", 0, "finish_reason", value="stop"), "after the finish_reason"),
        (_set(4, "choices", 0, "finish_reason", value=None), "without a finish_reason"),
        (_set(0, "choices", 0, "text", value=""), "empty chunk"),
        (_set(2, "choices", 0, "logprobs", "text_offset", value=[3]), "falls"),
        (_set(2, "choices", 0, "logprobs", "token_logprobs", value=[None]), "null"),
        (_set(2, "choices", 0, "stop_sequence", value=None), "no known key"),
        (_set(2, "object", value="text_completion.chunk"), "object"),
        (_set(5, "usage", "total_tokens", value=1), "add up"),
    ],
)
def test_broken_streams_of_text(change: Callable[[list[Any]], None], said: str) -> None:
    chunks = text_chunks()
    change(chunks)
    with pytest.raises(AssertionError, match=said):
        check_stream(TEXT, events(chunks))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop(0, "choices", 0, "delta", "role"), "no role"),
        (_set(1, "choices", 0, "delta", "role", value="assistant"), "role after"),
        (_set(1, "choices", 0, "delta", "content", value=""), "empty chunk"),
        (_set(7, "choices", 0, "delta", "content", value="b"), "not empty"),
        (_set(7, "choices", 0, "finish_reason", value="function_call"), "finish_reason"),
        (_drop(2, "choices", 0, "delta", "tool_calls", 0, "id"), "id is for its first chunk"),
        (_drop(2, "choices", 0, "delta", "tool_calls", 0, "function", "name"), "name is for its first chunk"),
        (_set(3, "choices", 0, "delta", "tool_calls", 0, "type", value="function"), "type is for its first chunk"),
        (_set(4, "choices", 0, "delta", "tool_calls", 0, "index", value=2), "begins after"),
        (_set(4, "choices", 0, "delta", "tool_calls", 0, "id", value="call_0"), "one id"),
        (_set(5, "choices", 0, "delta", "tool_calls", 0, "function", "arguments", value=""), "empty piece"),
        (_set(5, "choices", 0, "delta", "tool_calls", 0, "name", value="f"), "no known key"),
    ],
)
def test_broken_streams_of_a_chat(change: Callable[[list[Any]], None], said: str) -> None:
    chunks = chat_chunks()
    change(chunks)
    with pytest.raises(AssertionError, match=said):
        check_stream(TALK, events(chunks))


def test_content_is_null_only_with_tool_calls() -> None:
    with_calls, without = chat_chunks(), chat_chunks()[:2] + chat_chunks()[-1:]
    without[-1]["choices"][0]["finish_reason"] = "stop"
    check_stream(TALK, events(without))
    for chunks in (with_calls, without):
        chunks[0]["choices"][0]["delta"]["content"] = None
    check_stream(TALK, events(with_calls))
    with pytest.raises(AssertionError, match="content is null"):
        check_stream(TALK, events(without))


@pytest.mark.parametrize(
    ("path", "sent", "said"),
    [
        (TEXT, [], "no event"),
        (TEXT, ["[DONE]"], "without a choice"),
        (TEXT, events(text_chunks())[:-1], "without \\[DONE\\]"),
        (TEXT, [FAILED, "[DONE]"], "after an error"),
        (TEXT, ["[DONE]", "[DONE]"], "after \\[DONE\\]|without a choice"),
        (TEXT, [json.dumps({"error": {"message": "No."}})], "type"),
        (TALK, events(chat_chunks()[:2] + chat_chunks()[-1:]), "there are none"),
        (TALK, events(text_chunks()), "delta is missing"),
    ],
)
def test_broken_ends(path: str, sent: list[str], said: str) -> None:
    with pytest.raises((AssertionError, KeyError), match=said):
        check_stream(path, sent)


STREAM = "".join(f"data: {event}\n\n" for event in events(text_chunks())).encode()


@pytest.mark.parametrize(
    ("status", "kind", "content"),
    [
        (200, "text/event-stream", STREAM.replace(b"\n\n", b"\n")),
        (200, "text/event-stream", STREAM.replace(b"data: ", b"data:")),
        (200, "text/event-stream", STREAM[:-1]),
        (200, "text/event-stream", b": hello\n\n" + STREAM),
        (500, "text/event-stream", STREAM),
        (200, "text/plain", json.dumps(COMPLETION).encode()),
        (200, "application/json", b"{"),
        (503, "application/json", json.dumps(SAMPLES[-1][2]).encode()),
    ],
)
def test_broken_answers(status: int, kind: str, content: bytes) -> None:
    with pytest.raises((AssertionError, ValueError, KeyError)):
        check_response(TEXT, status, {"content-type": kind, "x-request-id": "1"}, content)


def test_every_answer_has_a_request_id() -> None:
    headers = {"content-type": "text/event-stream; charset=utf-8"}
    check_response(TEXT, 200, headers | {"x-request-id": "1"}, STREAM)
    for wrong in ({}, {"x-request-id": ""}, {"x-request-id": "a b"}):
        with pytest.raises(AssertionError):
            check_response(TEXT, 200, headers | wrong, STREAM)


@pytest.mark.parametrize(
    ("status", "kind", "content"),
    [
        (200, "application/json", json.dumps(MODEL).encode()),
        (400, "application/json", json.dumps(ERROR).encode()),
        (200, "text/event-stream", STREAM),
    ],
)
def test_an_answer_of_some_path(status: int, kind: str, content: bytes) -> None:
    headers = {"content-type": kind, "x-request-id": "1"}
    check_response_of_some_path(status, headers, content)
    check_response_of_some_path(200, {"content-type": "text/plain"}, b"OK")
    with pytest.raises(AssertionError):
        check_response_of_some_path(status, headers, content.replace(b'"', b'"x', 1))


class _Wrong(BaseHTTPRequestHandler):
    """Answers everything with a model list that has a key too many."""

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [], "extra": 1}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Request-Id", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def wrong_server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), _Wrong) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def test_every_kind_of_client_is_watched() -> None:
    async def asynchronously(url: str) -> None:
        async with httpx.AsyncClient() as client:
            await client.get(f"{url}/v1/models")
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as official:
            await official.models.list()

    with wrong_server() as url, checked_responses() as wrong:
        httpx.get(f"{url}/v1/models")
        httpx2.get(f"{url}/v1/models")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            client.models.list()
        assert len(wrong) == 3
        asyncio.run(asynchronously(url))
        assert len(wrong) == 5
        assert all("extra is no known key" in text for text in wrong)
