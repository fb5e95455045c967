"""Holds responses against tests/shapes.py, and against what must hold between their fields and between chunks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from tests.shapes import CHUNKS, ERROR, ERROR_CODES, LIVE, WHOLE, Shape


def check(path: str, status: int, body: Any) -> None:
    """Raise AssertionError unless `body`, the JSON of a whole answer, is what `path` may answer with `status`."""
    if status != 200:
        check_error(status, body)
        return
    route = route_of(path)
    assert route in WHOLE, f"no shape for {path}"
    _expect(mismatches(WHOLE[route], body))
    if route in CHUNKS:
        _expect(_broken_rules(body["choices"]))
        _expect(_wrong_usage(body["usage"]))
        assert body["choices"], "no choice"
        assert [choice["index"] for choice in body["choices"]] == [*range(len(body["choices"]))]


def route_of(path: str) -> str:
    """`path` as tests/shapes.py names it, without the model's id, and without a --root-path of one part."""
    for candidate in (path, "/" + path[1:].partition("/")[2]):
        if candidate.startswith("/v1/models/"):
            return "/v1/models/*"
        if candidate in WHOLE or candidate in LIVE:
            return candidate
    return path


def check_error(status: int, body: Any) -> None:
    """Raise AssertionError unless `body` is an error object of `status`."""
    assert 400 <= status < 600, f"status {status}"
    _expect(mismatches(ERROR, body))
    error = body["error"]
    kind = "server_error" if status >= 500 else {429: "rate_limit_error"}.get(status, "invalid_request_error")
    assert error["type"] == kind, (status, error)
    assert error["code"] is None or status in ERROR_CODES[error["code"]], (status, error)
    assert "\n" not in error["message"], error


def check_stream(path: str, events: Sequence[str], *, whole: bool = True) -> None:
    """Raise AssertionError unless `events`, the data of each server-sent event, are a stream of `path`.

    `whole` is false for the beginning of a stream that its reader left.
    """
    route = route_of(path)
    chunks: list[Any] = []
    for position, event in enumerate(events):
        is_last = position == len(events) - 1
        if event == "[DONE]":
            assert is_last, "an event after [DONE]"
            if route in CHUNKS:
                _check_end(chunks)
        elif "error" in (chunk := json.loads(event)):
            assert is_last, "an event after an error"
            check_error(500 if chunk["error"]["type"] == "server_error" else 400, chunk)
        else:
            assert not (whole and is_last), "the stream ends without [DONE] or an error"
            _expect(mismatches((CHUNKS | LIVE)[route], chunk))
            chunks.append(chunk)
    assert events or not whole, "no event"
    if route in CHUNKS:
        _check_answer(route, chunks)


def _check_answer(route: str, chunks: Sequence[Any]) -> None:
    """What must hold between the chunks of a generated answer, or of its beginning."""
    for key in ("id", "created", "model"):
        assert len({chunk[key] for chunk in chunks}) <= 1, f"chunks differ in {key}"
    assert len({"usage" in chunk for chunk in chunks}) <= 1, "usage in some chunks only"
    for number, chunk in enumerate(chunks):
        if chunk.get("usage") is not None:
            assert chunk["choices"] == [], "choices beside the usage"
            assert number == len(chunks) - 1, "a chunk after the usage"
            _expect(_wrong_usage(chunk["usage"]))
        else:
            assert len(chunk["choices"]) == 1, chunk
    by_index: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            by_index.setdefault(choice["index"], []).append(choice)
    for choices in by_index.values():
        _expect(_broken_chat_stream(choices) if "chat" in route else _broken_text_stream(choices))


def mismatches(shape: Shape, value: Any, where: str = "") -> Iterator[str]:
    """What of `value` is not as `shape` says, in words."""
    here = where or "the body"
    if isinstance(shape, tuple):
        found = [list(mismatches(item, value, where)) for item in shape]
        if all(found):
            # Of several shapes, tell about the one that the value was meant to be.
            yield from min(found, key=lambda wrong: any(f"{here} is" in text for text in wrong))
    elif isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{here} is {value!r:.100}, not an object"
        elif str in shape:
            for key, item in value.items():
                yield from mismatches(shape[str], item, f"{where}.{key}")
        else:
            yield from _wrong_keys(shape, value, where)
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{here} is {value!r:.100}, not a list"
        else:
            for index, item in enumerate(value):
                yield from mismatches(shape[0], item, f"{where}[{index}]")
    elif not _is(shape, value):
        yield f"{here} is {value!r:.100}, not {getattr(shape, '__name__', shape)}"


def _wrong_keys(shape: dict[str, Shape], value: dict[str, Any], where: str) -> Iterator[str]:
    known = {key.removesuffix("?"): (key, item) for key, item in shape.items()}
    for name in value.keys() - known.keys():
        yield f"{where}.{name} is no known key"
    for name, (key, item) in known.items():
        if name in value:
            yield from mismatches(item, value[name], f"{where}.{name}")
        elif not key.endswith("?"):
            yield f"{where}.{name} is missing"


def _is(shape: Shape, value: Any) -> bool:
    if isinstance(shape, set):
        return isinstance(value, str) and value in shape
    if shape is None:
        return value is None
    if shape is float:
        return type(value) in (int, float) and math.isfinite(value)
    if isinstance(shape, type):
        return type(value) is shape
    return bool(shape(value))


def _expect(wrong: Iterator[str]) -> None:
    found = list(wrong)
    assert not found, "; ".join(found[:5])


def _wrong_usage(usage: Any) -> Iterator[str]:
    if usage["prompt_tokens"] + usage["completion_tokens"] != usage["total_tokens"]:
        yield f"usage does not add up: {usage}"
    if usage.get("prompt_tokens_details", {"cached_tokens": 0})["cached_tokens"] > usage["prompt_tokens"]:
        yield f"more cached tokens than there are: {usage}"


def _broken_rules(choices: Sequence[Any]) -> Iterator[str]:
    """Of whole choices."""
    for choice in choices:
        if "message" in choice:
            yield from _broken_message(choice["message"], choice["finish_reason"])
        elif choice["logprobs"] is not None:
            yield from _broken_lists(choice["logprobs"])
        yield from _broken_routing(choice)


def _broken_message(message: Any, finish_reason: str) -> Iterator[str]:
    calls = message.get("tool_calls")
    if calls == []:
        yield "tool_calls is empty"
    if message["content"] is None and not calls:
        yield "content is null without tool_calls"
    if finish_reason == "tool_calls" and not calls:
        yield "finish_reason is tool_calls, and there are none"
    if len({call["id"] for call in calls or ()}) != len(calls or ()):
        yield "two tool calls have one id"


def _broken_lists(lists: Any, *, start: bool = True) -> Iterator[str]:
    """The lists of a completion's log probabilities; `start` is false where others came before."""
    if len({len(items) for items in lists.values()}) != 1:
        yield "the lists of logprobs differ in length"
    for index, (score, top) in enumerate(zip(lists["token_logprobs"], lists["top_logprobs"], strict=False)):
        if score is None and not (start and index == 0):
            yield f"token_logprobs[{index}] is null"
        if (score is None) != (top is None):
            yield f"top_logprobs[{index}] is {top!r} beside {score!r}"
    if any(before > after for before, after in pairwise(lists["text_offset"])):
        yield "text_offset falls"


def _broken_routing(choice: Any) -> Iterator[str]:
    for token in [*choice.get("routing", {}).get("prompt", ()), *choice.get("routing", {}).get("tokens", ())]:
        layers = [len(token[key]) for key in ("experts", "weights", "entropy")]
        if len({*layers}) != 1 or [*map(len, token["experts"])] != [*map(len, token["weights"])]:
            yield f"the lists of a routing trace differ in length: {token}"


def _broken_finish(choices: Sequence[Any]) -> Iterator[str]:
    if any(choice["finish_reason"] is not None for choice in choices[:-1]):
        yield "a chunk after the finish_reason"
    for choice in choices:
        yield from _broken_routing(choice)


def _broken_text_stream(choices: Sequence[Any]) -> Iterator[str]:
    """The chunks of one choice of a completion."""
    yield from _broken_finish(choices)
    if any(choice["text"] == "" and choice["finish_reason"] is None for choice in choices):
        yield "an empty chunk before the finish_reason"
    start, offsets = True, list[int]()
    for choice in choices:
        if choice["logprobs"] is not None:
            yield from _broken_lists(choice["logprobs"], start=start)
            offsets += choice["logprobs"]["text_offset"]
            start = False
    if any(before > after for before, after in pairwise(offsets)):
        yield "text_offset falls from one chunk to the next"


def _broken_chat_stream(choices: Sequence[Any]) -> Iterator[str]:
    """The chunks of one choice of a chat."""
    yield from _broken_finish(choices)
    if choices[0]["delta"].get("role") != "assistant":
        yield "the first chunk has no role"
    calls: dict[int, Any] = {}
    has_null = False
    for number, choice in enumerate(choices):
        delta = choice["delta"]
        has_null |= delta.get("content", "") is None
        if number and "role" in delta:
            yield "a role after the first chunk"
        if choice["finish_reason"] is not None and delta.get("tool_calls", delta.get("content")):
            yield "the last chunk's delta is not empty"
        elif choice["finish_reason"] is None and number and not delta.get("content") and not delta.get("tool_calls"):
            yield "an empty chunk between the first and the last"
        for call in delta.get("tool_calls", ()):
            yield from _broken_call(call, calls)
    if choices[-1]["finish_reason"] == "tool_calls" and not calls:
        yield "finish_reason is tool_calls, and there are none"
    if choices[-1]["finish_reason"] is not None and has_null and not calls:
        yield "content is null without tool_calls"
    if len(set(calls.values())) != len(calls):
        yield "two tool calls have one id"


def _broken_call(call: Any, calls: dict[int, Any]) -> Iterator[str]:
    """A piece of a tool call. `calls` has the ids of those that have begun, and gets this one's."""
    begins = call["index"] not in calls
    for name, holder in (("id", call), ("type", call), ("name", call["function"])):
        if (name in holder) != begins:
            yield f"a tool call's {name} is for its first chunk, and only that"
    if begins and call["index"] != len(calls):
        yield f"tool call {call['index']} begins after {len(calls)} others"
    calls.setdefault(call["index"], call.get("id"))
    if not begins and not call["function"].get("arguments"):
        yield "an empty piece of a tool call's arguments"


def _check_end(chunks: Sequence[Any]) -> None:
    """Of a stream that ends with [DONE]."""
    finished: dict[int, bool] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            finished[choice["index"]] = choice["finish_reason"] is not None
    assert finished, "a stream without a choice"
    assert all(finished.values()), "a choice without a finish_reason"
    assert {*finished} == {*range(len(finished))}, f"choices {sorted(finished)}"
    if "usage" in chunks[-1]:
        assert chunks[-1]["usage"] is not None, "include_usage, and no usage at the end"
