"""POST /v1/completions: shapes, streamed and whole."""

from __future__ import annotations

from typing import Any

import pytest

from engine.text import Tokenizer
from engine.types import Request
from tests.server.conftest import ANSWER
from tests.server.fake_engine import fake_logprob
from tests.server.harness import MODEL, Live

PATH = "/v1/completions"


def last_request(server: Live) -> Request:
    return server.call(lambda: server.engine.requests[-1])


def test_a_whole_answer(server: Live) -> None:
    body = server.complete(prompt="Hi", max_tokens=20)
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert body["model"] == MODEL
    assert body["choices"] == [{"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9}
    assert body.keys() == {"id", "object", "created", "model", "choices", "usage"}


def test_a_streamed_answer(server: Live) -> None:
    chunks = server.chunks(PATH, {"prompt": "Hi"})
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["created"] for chunk in chunks} == {chunks[0]["created"]}
    assert all(chunk.keys() == {"id", "object", "created", "model", "choices"} for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all(choice.keys() == {"index", "text", "logprobs", "finish_reason"} for choice in choices)
    assert "".join(choice["text"] for choice in choices) == ANSWER
    assert [choice["finish_reason"] for choice in choices] == [None] * 6 + ["stop"]
    assert all(choice["text"] for choice in choices[:-1])


def test_usage_in_a_stream(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "num_cached_tokens", 1))
    *chunks, last = server.chunks(PATH, {"prompt": "Hi", "stream_options": {"include_usage": True}})
    assert [chunk["usage"] for chunk in chunks] == [None] * 7
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 7,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


@pytest.mark.parametrize("options", [{}, {"include_usage": False}, {"include_usage": None}, {"unknown": 1}])
def test_options_that_ask_for_no_usage(server: Live, options: dict[str, Any]) -> None:
    chunks = server.chunks(PATH, {"prompt": "Hi", "stream_options": options})
    assert all("usage" not in chunk for chunk in chunks)


def test_the_default_is_16_tokens(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "script", lambda _: [5] * 50))
    body = server.complete()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("Hi", 1), (["Hi", "Hello you"], 2), ([5, 6, 7], 1), ([[5, 6], [7], [8]], 3)],
)
def test_forms_of_a_prompt(server: Live, tokenizer: Tokenizer, prompt: Any, num_prompts: int) -> None:
    body = server.complete(prompt=prompt)
    assert [choice["index"] for choice in body["choices"]] == list(range(num_prompts))
    assert [choice["text"] for choice in body["choices"]] == [ANSWER] * num_prompts
    expected = [
        tuple(tokenizer.encode(item)) if isinstance(item, str) else tuple(item)
        for item in (prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt])
    ]
    assert server.call(lambda: [request.prompt_ids for request in server.engine.requests]) == expected
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert body["usage"]["completion_tokens"] == 7 * num_prompts


def test_n_choices_of_each_prompt(server: Live, tokenizer: Tokenizer) -> None:
    words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in ("red", "green", "blue")]

    def script(request: Request) -> list[int]:
        return [request.prompt_ids[0], words[request.params.choice]]

    server.call(lambda: setattr(server.engine, "script", script))
    body = server.complete(prompt=[[words[0]], [words[1]]], n=3, temperature=0, seed=7)
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == [f" {p} {c}" for p in ("red", "green") for c in ("red", "green", "blue")]
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 18, "total_tokens": 20}
    assert server.call(lambda: {request.params.seed for request in server.engine.requests}) == {7}

    chunks = server.chunks(PATH, {"prompt": [[words[0]], [words[1]]], "n": 3})
    streamed = [""] * 6
    for chunk in chunks:
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_best_of_returns_the_likeliest(server: Live) -> None:
    def script(request: Request) -> list[int]:  # tokens 16, 17, … have log probabilities 0, -1/16, …
        return [16 + (request.params.choice + 3) % 5]

    server.call(lambda: setattr(server.engine, "script", script))
    body = server.complete(prompt=[[5], [6]], n=2, best_of=5, max_tokens=1, logprobs=0)
    scores = [choice["logprobs"]["token_logprobs"] for choice in body["choices"]]
    assert scores == [[0.0], [-1 / 16]] * 2
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 10, "all that were generated"
    plain = server.complete(prompt=[5], best_of=3, max_tokens=1)
    assert plain["choices"][0]["logprobs"] is None
    assert last_request(server).params.logprobs == 0


def test_logprobs(server: Live, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(ANSWER.strip(), add_special_tokens=False)
    logprobs = server.complete(logprobs=3)["choices"][0]["logprobs"]
    assert logprobs.keys() == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(logprobs["tokens"]) == ANSWER
    assert logprobs["token_logprobs"] == [fake_logprob(token) for token in ids]
    assert logprobs["text_offset"] == [ANSWER.index(token) for token in logprobs["tokens"]]
    assert all(len(top) == 3 for top in logprobs["top_logprobs"])
    for token, score, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True):
        assert top[token] == score


def test_streamed_logprobs_are_the_whole_ones(server: Live) -> None:
    for body in ({"logprobs": 2}, {"logprobs": 1, "echo": True}, {"logprobs": 0, "stop": "the fake"}):
        whole = server.complete(**body)["choices"][0]["logprobs"]
        joined: dict[str, list[Any]] = {name: [] for name in whole}
        for chunk in server.chunks(PATH, {"prompt": "Hi"} | body):
            if (part := chunk["choices"][0]["logprobs"]) is not None:
                for name, values in part.items():
                    joined[name] += values
        assert joined == whole


def test_a_prompt_is_scored(server: Live, tokenizer: Tokenizer) -> None:
    prompt = "The sky is blue"
    ids = tokenizer.encode(prompt)
    body = server.complete(prompt=prompt, echo=True, logprobs=1, max_tokens=0)
    (choice,) = body["choices"]
    assert choice["text"] == prompt
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", " The", " sky", " is", " blue"]
    assert logprobs["token_logprobs"] == [None, *map(fake_logprob, ids[1:])]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][2] == {" sky": fake_logprob(ids[2])}
    assert logprobs["text_offset"] == [0, 0, 3, 7, 10]
    assert body["usage"] == {"prompt_tokens": 5, "completion_tokens": 0, "total_tokens": 5}


def test_a_prompt_and_one_more_token_are_scored(server: Live, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The sky is")
    logprobs = server.complete(prompt=ids, echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(ids) + 1
    assert logprobs["tokens"][-1] == " Hello"


def test_echo(server: Live, tokenizer: Tokenizer) -> None:
    assert server.complete(prompt="Say  it", echo=True)["choices"][0]["text"] == "Say  it" + ANSWER
    assert server.complete(prompt=tokenizer.encode("Say it"), echo=True)["choices"][0]["text"] == "Say it" + ANSWER
    only = server.complete(prompt="Say it", echo=True, max_tokens=0)
    assert only["choices"][0]["text"] == "Say it"
    assert only["choices"][0]["logprobs"] is None
    chunks = server.chunks(PATH, {"prompt": "Say it", "echo": True, "n": 2})
    firsts = [next(c["choices"][0] for c in chunks if c["choices"][0]["index"] == index) for index in (0, 1)]
    assert [first["text"] for first in firsts] == ["Say it", "Say it"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_request_in_the_engine(server: Live, stream: bool) -> None:
    server.call(lambda: setattr(server.engine, "step_seconds", 0.01))
    if stream:
        chunks = server.chunks(PATH, {"prompt": "Hi", "stop": ["nothing", " fake"]})
        text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        body = server.complete(stop=["nothing", " fake"])
        text = body["choices"][0]["text"]
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == 3
    assert text == " Hello from the"
    assert server.call(lambda: len(server.engine.aborted)) == 1
    assert server.call(lambda: server.engine.stats.num_running) == 0


def test_every_parameter_reaches_the_engine(server: Live) -> None:
    server.complete(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, presence_penalty=0.2,
        frequency_penalty=-0.3, repetition_penalty=1.1, logit_bias={"5": -100, "6": 1.5}, seed=-3, logprobs=4,
        echo=True, stop=["zz"], stop_token_ids=[9], ignore_eos=True, include_stop_str_in_output=True,
        skip_special_tokens=False, priority=-5, cache_salt="mine",
    )  # fmt: skip
    request = last_request(server)
    assert (request.priority, request.cache_salt) == (-5, "mine")
    params = request.params
    assert (params.max_tokens, params.min_tokens, params.seed, params.choice) == (9, 2, -3, 0)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 40, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.2, -0.3, 1.1)
    assert params.logit_bias == ((5, -100.0), (6, 1.5))
    assert (params.logprobs, params.prompt_logprobs) == (4, 4)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("zz",), (9,), True)
    assert (params.include_stop_str_in_output, params.skip_special_tokens) == (True, False)


def test_numbers_may_be_written_as_integers(server: Live) -> None:
    server.complete(temperature=0, top_p=1, presence_penalty=-2, logit_bias={"5": 1})
    assert last_request(server).params.greedy


def test_defaults(server: Live) -> None:
    server.complete()
    params = last_request(server).params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
    assert (params.seed, params.logprobs, params.prompt_logprobs) == (None, None, None)
    assert params.stop_token_ids == (2,), "the tokenizer's end of sequence"


def test_as_many_stop_ids_as_may_be_leave_room_for_the_end_of_sequence(server: Live) -> None:
    assert server.complete(stop_token_ids=[9] * 128)["choices"]
    assert last_request(server).params.stop_token_ids == (*[9] * 128, 2)


def test_cached_tokens_count_once_a_prompt(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "num_cached_tokens", 2))
    usage = server.complete(prompt=[[5, 6, 7], [8, 9, 10]], n=4)["usage"]
    assert usage["prompt_tokens"] == 6
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}
    server.call(lambda: setattr(server.engine, "num_cached_tokens", 0))
    assert "prompt_tokens_details" not in server.complete()["usage"]


def test_scoring_a_prompt_many_times_is_bounded(server: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.job.MAX_SCORED_ENTRIES", 20_000)
    body: dict[str, Any] = {"prompt": [5] * 200, "max_tokens": 1, "echo": True, "logprobs": 20}
    response = server.post(PATH, body | {"n": 128})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == "logprobs"
    assert "20000" in error["message"]
    assert len(server.complete(**body, n=2)["choices"]) == 2
