"""Times and counts of one streamed answer."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.bench.answer import Answer, AnswerReader, Failure, Outcome, refusal

START = 100.0


def read(*timed: tuple[float, Any], parts: int = 1) -> Outcome:
    """The outcome of events that came at their times after the start; a str is sent as it is."""
    reader = AnswerReader(START)
    for seconds, data in timed:
        event = f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
        size = -(-len(event) // parts)
        for start in range(0, len(event), size):
            reader.feed(event[start : start + size], START + seconds)
    return reader.outcome()


def text(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"id": "x", "choices": [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}]}


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}]}


def usage(prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": completion, **more}}


def answer(outcome: Outcome) -> Answer:
    assert isinstance(outcome, Answer), outcome
    return outcome


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_a_completion(parts: int) -> None:
    found = answer(
        read(
            (0.5, text("a")),
            (0.7, text("b")),
            (1.0, text("c", "length")),
            (1.1, usage(7, 5)),
            (1.1, "[DONE]"),
            parts=parts,
        )
    )
    assert found.ttft == pytest.approx(0.5)
    assert found.itls == pytest.approx([0.2, 0.3])
    assert found.latency == pytest.approx(1.0), "to the last token, not to the usage"
    assert (found.input_tokens, found.output_tokens, found.counted) == (7, 5, True)
    assert found.tpot == pytest.approx(0.5 / 4), "over the tokens that the server has counted"


def test_a_chat() -> None:
    """A chunk that names the role alone is no token; one with text is, whatever kind of text."""
    found = answer(
        read(
            (0.1, delta(role="assistant", content="")),
            (0.5, delta(reasoning_content="hm")),
            (0.6, delta(content="a")),
            (0.9, delta(content="b", role="assistant")),
            (1.0, delta("stop")),
            (1.0, "[DONE]"),
        )
    )
    assert found.ttft == pytest.approx(0.5)
    assert found.itls == pytest.approx([0.1, 0.3])
    assert found.latency == pytest.approx(1.0)


def test_a_token_that_is_no_whole_character_counts() -> None:
    found = answer(read((0.5, text("")), (0.6, text("")), (0.8, text("é")), (0.9, text("", "stop"))))
    assert found.ttft == pytest.approx(0.5)
    assert found.itls == pytest.approx([0.1, 0.2])
    assert found.output_tokens == 3


def test_chunks_are_counted_where_the_server_does_not() -> None:
    found = answer(read((0.5, text("a")), (0.6, text("b")), (0.6, text("", "length")), (0.6, "[DONE]")))
    assert (found.output_tokens, found.counted, found.input_tokens) == (2, False, None)


def test_one_token_has_no_time_per_output_token() -> None:
    found = answer(read((0.5, text("a", "length")), (0.5, usage(1, 1))))
    assert found.tpot is None
    assert found.itls == []
    assert found.latency == pytest.approx(0.5)


def test_an_answer_that_shows_no_text_still_has_a_first_token() -> None:
    assert answer(read((0.5, text("", "length")), (0.5, usage(1, 1)))).ttft == pytest.approx(0.5)


def test_cached_tokens_and_a_running_usage() -> None:
    running = [(0.1, text("a") | {"usage": {"prompt_tokens": 9, "completion_tokens": 1}}), (0.2, text("b", "stop"))]
    found = answer(read(*running, (0.2, usage(9, 2, prompt_tokens_details={"cached_tokens": 8}))))
    assert (found.cached_tokens, found.input_tokens, found.output_tokens) == (8, 9, 2)
    assert answer(read(*running, (0.2, usage(9, 2, prompt_tokens_details=None)))).cached_tokens == 0


@pytest.mark.parametrize(
    ("timed", "kind", "message"),
    [
        ([(0.1, text("a"))], "broken off", "before its last chunk"),
        ([], "broken off", "before its last chunk"),
        ([(0.1, "[DONE]")], "no tokens", "no token"),
        (
            [(0.1, text("a")), (0.2, {"error": {"message": "out of\nmemory", "code": 500}})],
            "error in stream",
            "out of memory",
        ),
        ([(0.1, {"error": "bad"}), (0.2, "[DONE]")], "error in stream", "bad"),
        ([(0.1, {"error": {}}), (0.2, "[DONE]")], "error in stream", "no reason given"),
        ([(0.1, "{"), (0.2, text("a", "stop"))], "bad chunk", ""),
        (
            [(0.1, {"choices": [{"text": 5}]}), (0.2, text("a", "stop"))],
            "bad chunk",
            "Expected `str | null`, got `int`",
        ),
    ],
)
def test_failures(timed: list[tuple[float, Any]], kind: str, message: str) -> None:
    found = read(*timed)
    assert isinstance(found, Failure)
    assert found.kind == kind
    assert message in found.message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "queue full", "code": "server_overloaded"}}', "queue full"),
        (b'{"error": {"code": "server_overloaded"}}', "server_overloaded"),
        (b'{"object": "error", "message": "no such model"}', "no such model"),
        (b'{"error": "plain"}', "plain"),
        (b"<html>", "no reason given"),
        (b"Internal\nServer Error " + b"x" * 1000, "Internal Server Error " + "x" * 278),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"detail": [{"loc": ["body"], "msg": "no list"}]}', "[{'loc': ['body'], 'msg': 'no list'}]"),
        (b'{"else": "Not Found"}', "no reason given"),
        (b"[" * 100_000, "no reason given"),
        (b"", "no reason given"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refusals(body: bytes, message: str) -> None:
    assert refusal(503, body) == Failure("HTTP 503", message)
