"""Answers that must match a grammar, from a real server at temperature 1, and grammars that must not be tried.

What a stopped answer is worth is said by jsonschema and re, of a cut one by pydantic's parser of unfinished JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from jsonschema import Draft202012Validator
from pydantic_core import from_json

from tests.e2e.error_answers import check_error
from tests.e2e.good_streams import unharmed
from tests.e2e.running import Server, running_server
from tests.engine.grammar.hopeless import SLOW
from tests.random_schemas import RandomSchema, random_schema

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
REFUSED_SECONDS = 2.0
NUM_SCHEMAS = 100
TOKENS = {True: 1900, False: 400}
"""What an answer may take, by whether its schema is bounded."""


@dataclass(frozen=True)
class Answer:
    text: str
    finish_reason: str


@dataclass(frozen=True)
class Asker:
    """A server's two endpoints."""

    client: httpx.Client
    model: str
    prompt: str

    def ask(self, path: str, **fields: Any) -> Answer:
        """Whole and streamed, which must be the same: of a tiny model, whose probabilities rounding hardly moves."""
        whole, streamed = self.ask_whole(path, **fields), self.ask_streamed(path, **fields)
        assert streamed == whole, f"{path}: {streamed} streamed, {whole} returned"
        return whole

    def ask_whole(self, path: str, **fields: Any) -> Answer:
        response = self.client.post(path, json=self._body(path, fields))
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        text = choice["message"]["content"] if path == CHAT else choice["text"]
        return Answer(text, choice["finish_reason"])

    def _body(self, path: str, fields: dict[str, Any]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "temperature": 1, "prompt": self.prompt} | fields
        if path == CHAT:
            body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
        return body

    def ask_streamed(self, path: str, **fields: Any) -> Answer:
        body = self._body(path, fields)
        response = self.client.post(path, json=body | {"stream": True})
        assert response.status_code == 200, response.text
        *events, last, end = response.text.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        pieces = [choice["delta"].get("content") if path == CHAT else choice["text"] for choice in choices]
        return Answer("".join(piece or "" for piece in pieces), choices[-1]["finish_reason"])


Ask = Callable[..., Answer]


@pytest.fixture(scope="module")
def tiny(tiny_server: Server) -> Iterator[Asker]:
    with httpx.Client(base_url=tiny_server.url, timeout=120) as client:
        yield Asker(client, "tiny", "Say something: ")


@pytest.fixture(scope="module")
def demo(demo_server: Server) -> Iterator[Asker]:
    with httpx.Client(base_url=demo_server.url, timeout=250) as client:
        yield Asker(client, "mixserve-demo", "Describe a person in JSON.")


def format_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def problem(schema: Any, answer: Answer) -> str | None:
    """What is wrong with an answer under `schema`."""
    try:
        if answer.finish_reason != "stop":
            from_json(answer.text, allow_partial="trailing-strings")
            return None
        json.loads(answer.text)
        value = json.loads(answer.text, parse_float=Decimal)  # a float may round a number up to a bound
    except ValueError as error:
        return f"{error}: {answer}"
    errors = [error.message for error in Draft202012Validator(schema).iter_errors(value)]
    return f"{errors[0]}: {answer}" if errors else None


def problems_of(ask: Ask, case: RandomSchema, seed: int, tokens: int) -> tuple[list[str], list[str]]:
    """Problems and finish reasons, through both endpoints and three ways to write the schema."""
    written: list[tuple[str, dict[str, Any]]] = [
        (CHAT, format_of(case.schema)),
        (COMPLETIONS, {"structured_outputs": {"json": case.schema if seed % 2 else json.dumps(case.schema)}}),
    ]
    found: list[str] = []
    ends: list[str] = []
    for number, (path, fields) in enumerate(written):
        try:
            answer = ask(path, **fields, max_tokens=tokens, seed=2 * seed + number)
        except AssertionError as error:
            return [f"{case.name}: {error}"], ends
        ends.append(answer.finish_reason)
        wrong = problem(case.schema, answer)
        if wrong is None and case.bounded and answer.finish_reason != "stop" and tokens == TOKENS[True]:
            wrong = f"bounded, but does not stop: {answer}"
        if wrong is not None:
            found.append(f"{case.name}, {path}: {wrong}")
    return found, ends


def test_random_schemas(tiny: Asker) -> None:
    cases = [random_schema(seed) for seed in range(NUM_SCHEMAS)]
    with ThreadPoolExecutor(16) as pool:
        tokens = [TOKENS[case.bounded] for case in cases]
        results = list(pool.map(problems_of, [tiny.ask] * NUM_SCHEMAS, cases, range(NUM_SCHEMAS), tokens))
    assert [wrong for found, _ in results for wrong in found] == []
    ends = Counter(end for _, found in results for end in found)
    assert ends.keys() == {"stop", "length"}
    assert ends["stop"] > 0.8 * 2 * NUM_SCHEMAS
    assert sum(case.bounded for case in cases) > 20


@pytest.mark.parametrize("tokens", [1, 5, 17])
def test_answers_that_are_cut_begin_as_they_must(tiny: Asker, tokens: int) -> None:
    cases = [random_schema(seed) for seed in range(20)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(problems_of, [tiny.ask] * 20, cases, range(20), [tokens] * 20))
    assert [wrong for found, _ in results for wrong in found] == []
    assert "length" in {end for _, found in results for end in found}


@pytest.mark.demo
def test_random_schemas_with_a_real_vocabulary(demo: Asker) -> None:
    cases = [case for case in map(random_schema, range(NUM_SCHEMAS)) if case.bounded][:8]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(problems_of, [demo.ask_whole, demo.ask_streamed] * 4, cases, range(8), [100] * 8))
    assert [wrong for found, _ in results for wrong in found] == []
    ends = Counter(end for _, found in results for end in found)
    assert ends["stop"] > 8


def test_the_checks_see_what_is_wrong(tiny: Asker) -> None:
    """Without the grammar nothing of it holds."""
    schema = random_schema(1).schema
    free = tiny.ask(COMPLETIONS, max_tokens=30, seed=1)
    assert problem(schema, free) is not None
    assert problem(schema, Answer(free.text, "stop")) is not None
    assert problem({"type": "integer", "maximum": 5}, Answer("6", "stop")) is not None
    assert problem({"type": "integer", "maximum": 5}, Answer("5", "stop")) is None


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["tea", "日本", 'a "b"']}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


@pytest.mark.demo
def test_the_demo_model_fills_in_a_form(demo: Asker) -> None:
    answer = demo.ask_streamed(CHAT, **format_of(PERSON), temperature=0, max_tokens=150)
    assert answer.finish_reason == "stop"
    assert problem(PERSON, answer) is None
    assert [*json.loads(answer.text)] == ["name", "age", "likes"], "in the order of the schema"


GRAMMARS: list[tuple[dict[str, Any], str]] = [
    ({"regex": r"[a-z]{2,8}@[a-z]{1,9}\.(com|org)"}, r"[a-z]{2,8}@[a-z]{1,9}\.(com|org)"),
    ({"regex": r"\d{3}/\d{4}\n"}, r"[0-9]{3}/[0-9]{4}\n"),
    ({"regex": "(é|日本|😀){3}"}, "(é|日本|😀){3}"),
    ({"regex": "[^a-y]{4}"}, "[^a-y]{4}"),
    ({"choice": ["yes", "no", "naïve 😀", 'say "hi"\n']}, 'yes|no|naïve 😀|say "hi"\n'),
    ({"choice": [" leading and trailing "]}, " leading and trailing "),
    (
        {"grammar": 'start: "<" /[a-z]{1,5}/ ">" (NUMBER | "none")\nNUMBER: /-?[1-9][0-9]?/'},
        "<[a-z]{1,5}>(-?[1-9][0-9]?|none)",
    ),
    ({"grammar": 'root ::= "id-" digits\ndigits ::= [0-9]{2,3} | "é"'}, "id-([0-9]{2,3}|é)"),
    ({"grammar": 'start: %json {"type": "integer", "minimum": 5, "maximum": 12} ";"'}, "([5-9]|1[0-2]);"),
]


@pytest.mark.parametrize(("wanted", "pattern"), GRAMMARS, ids=[str(case[0]) for case in GRAMMARS])
def test_grammars(tiny: Asker, wanted: dict[str, Any], pattern: str) -> None:
    answers = [
        tiny.ask(path, structured_outputs=wanted, max_tokens=300, seed=seed)
        for seed in range(4)
        for path in (COMPLETIONS, CHAT)
    ]
    assert [answer for answer in answers if not re.fullmatch(pattern, answer.text)] == []
    assert {answer.finish_reason for answer in answers} == {"stop"}


@pytest.mark.demo
def test_grammars_with_a_real_vocabulary(demo: Asker) -> None:
    def ask(number: int) -> Answer:
        path, wanted = (COMPLETIONS, CHAT)[number % 2], GRAMMARS[number][0]
        return demo.ask_streamed(path, structured_outputs=wanted, max_tokens=80, seed=number)

    with ThreadPoolExecutor(len(GRAMMARS)) as pool:
        answers = list(pool.map(ask, range(len(GRAMMARS))))
    assert {answer.finish_reason for answer in answers} == {"stop"}
    for answer, (_, pattern) in zip(answers, GRAMMARS, strict=True):
        assert re.fullmatch(pattern, answer.text), answer


def test_json_objects(tiny: Asker) -> None:
    """A random model hardly ever closes a string: the quotes and brackets that it needs are made likelier."""
    bias = {str(byte): 4 for byte in b'"}],:'}
    answers = [
        tiny.ask(path, response_format={"type": "json_object"}, max_tokens=400, seed=seed, logit_bias=bias)
        for seed in range(10)
        for path in (COMPLETIONS, CHAT)
    ]
    assert [wrong for answer in answers if (wrong := problem({"type": "object"}, answer))] == []
    assert all(answer.text.startswith("{") for answer in answers)
    assert [answer.finish_reason for answer in answers].count("stop") > 10


def test_choices_of_one_request(tiny: Asker) -> None:
    """Each follows the grammar by itself, and is the same when asked for again."""
    body = {"model": "tiny", "prompt": "Hi", "n": 8, "seed": 5, "max_tokens": 100, "logprobs": 3}
    body |= {"structured_outputs": {"regex": "[a-z]{3}(é|日本)[0-9]{2}"}}
    first, again = (tiny.client.post(COMPLETIONS, json=body).json() for _ in range(2))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert len({*texts}) > 3
    assert all(re.fullmatch("[a-z]{3}(é|日本)[0-9]{2}", text) for text in texts)
    for choice in first["choices"]:
        assert choice["finish_reason"] == "stop"
        assert len(choice["logprobs"]["tokens"]) == len(choice["text"].encode())
        assert any(token not in "abcdefghijklmnopqrstuvwxyz" for token in choice["logprobs"]["top_logprobs"][0])
    assert first["usage"]["completion_tokens"] == sum(len(text.encode()) + 1 for text in texts)


def test_stop_strings_cut_a_grammars_text(tiny: Asker) -> None:
    answer = tiny.ask(COMPLETIONS, structured_outputs={"choice": ["one;two;three"]}, stop=[";t"], max_tokens=50)
    assert answer == Answer("one", "stop")


def refused(seconds: float, client: httpx.Client, path: str, fields: dict[str, Any], param: str | None) -> str:
    """The message of a 400 that came in time."""
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 5, "prompt": "Hi"} | fields
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    begin = time.monotonic()
    response = client.post(path, json=body)
    took = time.monotonic() - begin
    message: str = check_error(response, 400, param=param, code=None)["message"]
    assert took < seconds, f"{took:.2f} s for {message}"
    return message


BOTH = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
REFUSALS: list[tuple[dict[str, Any], str, str]] = [
    (BOTH, "structured_outputs", "structured_outputs and response_format cannot both be given."),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex, choice, grammar"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "exactly one of"),
    ({"structured_outputs": {"regex": "a", "other": 1}}, "structured_outputs", "and nothing else"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "response_format must be"),
    ({"response_format": {"type": "yaml"}}, "response_format", "response_format must be"),
    (format_of({"not": {}, "uniqueItems": True}), "response_format", 'Unimplemented keys: ["not", "uniqueItems"]'),
    (format_of({"$ref": "https://example.com/a.json"}), "response_format", "https://example.com/a.json"),
    ({"structured_outputs": {"json": '{"type": "flot"}'}}, "structured_outputs", "Invalid type: flot"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs", "structured_outputs.json is not JSON"),
    ({"structured_outputs": {"regex": r"a\b"}}, "structured_outputs", "lookarounds not supported"),
    ({"structured_outputs": {"grammar": "start: x"}}, "structured_outputs", 'line 1, column 8: unknown name: "x"'),
]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fields", "param", "message"), REFUSALS, ids=[case[2] for case in REFUSALS])
def test_refusals(tiny: Asker, path: str, fields: dict[str, Any], param: str, message: str) -> None:
    assert message in refused(REFUSED_SECONDS, tiny.client, path, fields, param)


def endless(name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"$ref": "#"}}, "required": [name]}


HOPELESS: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format", "must be"),
    (format_of(endless("next")), "response_format", "has no end"),
    (format_of({"type": "array", "minItems": 10**9}), "response_format", "at least 2000000001 characters"),
    (
        {"structured_outputs": {"json": '{"items":' * 60_000 + "{}" + "}" * 60_000}},
        "structured_outputs",
        "recursion limit",
    ),
    ({"structured_outputs": {"json": SLOW.text}}, "structured_outputs", "takes more than 1.2 seconds to compile"),
    (format_of(json.loads(SLOW.text.replace("k1", "x1"))), "response_format", "takes more than 1.2 seconds to compile"),
    ({"structured_outputs": {"regex": "(" * 60_000 + ")" * 60_000}}, "structured_outputs", "invalid regex: exceed"),
    ({"structured_outputs": {"regex": "((a{1,1000}){1,1000}){1,1000}"}}, "structured_outputs", "too many expressions"),
    (
        {"structured_outputs": {"grammar": f"start: {'(' * 60_000}'a'{')' * 60_000}"}},
        "structured_outputs",
        "line 1, column",
    ),
    ({"structured_outputs": {"choice": ["a" * 300_000]}}, "structured_outputs", "at most 262144 are taken"),
]


@pytest.fixture(scope="module")
def beside_good_streams(tiny_server: Server) -> Iterator[Callable[[], None]]:
    """Four streams that must not change; a call raises if one has. The process that checks grammars is there before."""
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 5, "structured_outputs": {"choice": ["warm"]}}
    assert httpx.post(f"{tiny_server.url}{COMPLETIONS}", json=body).status_code == 200
    with unharmed(tiny_server, "tiny") as streams:
        yield streams.check


@pytest.mark.parametrize(("fields", "param", "message"), HOPELESS, ids=[case[2] for case in HOPELESS])
def test_a_hopeless_grammar_beside_good_streams(
    tiny: Asker, beside_good_streams: Callable[[], None], fields: dict[str, Any], param: str, message: str
) -> None:
    """H16."""
    assert message in refused(REFUSED_SECONDS, tiny.client, COMPLETIONS, fields, param)
    beside_good_streams()
    number = str(time.monotonic())
    assert tiny.ask(COMPLETIONS, structured_outputs={"choice": [number]}, max_tokens=50) == Answer(number, "stop")


def checkers(server: Server) -> list[psutil.Process]:
    """The processes of `server` in which grammars are tried."""
    children = psutil.Process(server.process.pid).children()
    return [child for child in children if "engine.grammar.check_process" in child.cmdline()]


class Watched:
    """A stream that is read all the while, and when its tokens came."""

    def __init__(self, url: str) -> None:
        self.times: list[float] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url,))
        self._thread.start()

    def _read(self, url: str) -> None:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        while not self._stopped.is_set():
            with httpx.stream("POST", f"{url}{COMPLETIONS}", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: {"):
                        self.times.append(time.monotonic())
                    if self._stopped.is_set():
                        return

    def longest_gap(self, begin: float, end: float) -> float:
        return max(later - earlier for earlier, later in pairwise(self.times) if later > begin and earlier < end)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def test_streams_do_not_stall_while_a_hopeless_grammar_is_tried(
    tiny: Asker, tiny_server: Server, record_property: Callable[[str, object], None]
) -> None:
    """Nor when its process is killed and the next one starts."""
    tiny.ask(COMPLETIONS, structured_outputs={"choice": ["warm"]}, max_tokens=5)
    streams = [Watched(tiny_server.url) for _ in range(4)]
    try:
        time.sleep(2)
        (checker,) = checkers(tiny_server)
        begin = time.monotonic()
        for number in range(3):
            fields = {"structured_outputs": {"json": SLOW.text.replace("k3", f"z{number}")}}
            refused(REFUSED_SECONDS, tiny.client, COMPLETIONS, fields, "structured_outputs")
        end = time.monotonic()
        time.sleep(0.5)
    finally:
        for stream in streams:
            stream.stop()
    before = max(stream.longest_gap(begin - 1.5, begin) for stream in streams)
    during = max(stream.longest_gap(begin, end) for stream in streams)
    record_property("longest_gap_before_ms", round(1e3 * before))
    record_property("longest_gap_during_ms", round(1e3 * during))
    print(f"longest gap between two tokens: {1e3 * before:.0f} ms before, {1e3 * during:.0f} ms during")
    assert during < 1.0 + 2 * before, "on a busy machine there are gaps anyway"
    assert not psutil.pid_exists(checker.pid)
    assert len(checkers(tiny_server)) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_no_checker_outlives_its_server(tiny_checkpoint: Path, how: signal.Signals) -> None:
    """Even one that was busy."""
    with running_server(str(tiny_checkpoint), "--served-model-name", "tiny", "--shutdown-timeout", "0") as server:
        body = {"model": "tiny", "prompt": "Hi", "max_tokens": 5, "structured_outputs": {"choice": ["warm"]}}
        assert httpx.post(f"{server.url}{COMPLETIONS}", json=body, timeout=30).status_code == 200
        (checker,) = checkers(server)
        hopeless = body | {"structured_outputs": {"json": SLOW.text}}
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(f"{server.url}{COMPLETIONS}", json=hopeless, timeout=0.3)
        server.process.send_signal(how)
        gone = server.process.wait(10)
        assert gone == (-signal.SIGKILL if how is signal.SIGKILL else 0)
        with contextlib.suppress(psutil.NoSuchProcess):
            checker.wait(5)
        assert not psutil.pid_exists(checker.pid)
