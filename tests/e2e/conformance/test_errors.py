"""API.md: "Errors: {"error": {"message", "type", "param", "code"}}; `code` is a string or null ..."."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conformance.asking import MODEL, Ask
from tests.e2e.conformance.conftest import KEYS
from tests.e2e.running import Server, running_server

LONG: dict[str, Any] = {
    "model": MODEL,
    "prompt": "a long story",
    "max_tokens": 16_000,
    "extra_body": {"ignore_eos": True},
}


def body_of(error: openai.APIStatusError) -> dict[str, Any]:
    body: dict[str, Any] = error.response.json()
    return body


def test_an_error_has_four_fields_and_the_client_finds_them(ask: Ask) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask.complete(temperature=3)
    error = caught.value
    assert error.status_code == 400, "never 422"
    assert body_of(error).keys() == {"error"}
    assert body_of(error)["error"].keys() == {"message", "type", "param", "code"}
    assert (error.type, error.param, error.code) == ("invalid_request_error", "temperature", None)
    assert error.request_id == error.response.headers["x-request-id"]
    assert "temperature" in error.message


def test_model_not_found(ask: Ask) -> None:
    for name in ("gpt-4o", "../../x"):
        for call in (ask.complete, ask.chat):
            with pytest.raises(openai.NotFoundError) as caught:
                call(model=name)
            assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_model_not_found_by_its_id(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"prompt": [65] * 3000}, ("2048", "3000")),
        ({"prompt": [65] * 2000, "max_tokens": 49}, ("2000", "49")),
    ],
)
def test_context_length_exceeded_has_both_counts(ask: Ask, fields: dict[str, Any], counts: tuple[str, str]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask.complete(**fields)
    assert caught.value.code == "context_length_exceeded"
    assert set(counts) <= set(re.findall(r"\d+", caught.value.message)), caught.value.message


def test_context_length_exceeded_in_a_chat(ask: Ask) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask.chat("x" * 3000)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")


def test_max_tokens_is_never_capped_in_silence(ask: Ask) -> None:
    """48 more fit after 2,000, and are generated; of 49, none."""
    fits = ask.complete(prompt=[65] * 2000, max_tokens=48, extra={"ignore_eos": True})
    assert fits.usage.completion_tokens == 48
    with pytest.raises(openai.BadRequestError):
        ask.complete(prompt=[65] * 2000, max_tokens=49, extra={"ignore_eos": True})


def keyed(server: Server, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0, timeout=60)


@contextmanager
def running_stream(client: openai.OpenAI) -> Iterator[None]:
    """A request that generates until the block ends."""
    with client.completions.create(**LONG, stream=True) as stream:
        next(iter(stream))
        yield


def test_invalid_api_key(keyed_server: Server) -> None:
    for key in ("nonsense", KEYS[0] + "x", KEYS[0][:-1]):
        with keyed(keyed_server, key) as client:
            for stream in (False, True):
                with pytest.raises(openai.AuthenticationError) as caught:
                    Ask(client, stream=stream).complete()
                assert (caught.value.code, caught.value.type) == ("invalid_api_key", "invalid_request_error")
                assert key not in caught.value.message
            with pytest.raises(openai.AuthenticationError):
                client.models.list()
    with keyed(keyed_server, KEYS[1]) as client:
        assert [model.id for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize("stream", [False, True])
def test_rate_limit_exceeded(keyed_server: Server, stream: bool) -> None:
    """A second request of one key, while another key's is taken."""
    with keyed(keyed_server, KEYS[0]) as client, running_stream(client):
        with pytest.raises(openai.RateLimitError) as caught:
            Ask(client, stream=stream).complete()
        assert caught.value.code == "rate_limit_exceeded"
        assert int(caught.value.response.headers["retry-after"]) >= 1
    keyed_server.wait_for_metric("mixserve_num_requests_running", 0, seconds=2, key=KEYS[0])
    with keyed(keyed_server, KEYS[0]) as client:
        Ask(client, stream=stream).complete()


@pytest.mark.parametrize("stream", [False, True])
def test_server_overloaded(keyed_server: Server, stream: bool) -> None:
    """One runs, one waits, the third is refused; then the second runs."""
    with keyed(keyed_server, KEYS[1]) as second, ThreadPoolExecutor(1) as pool:
        with keyed(keyed_server, KEYS[0]) as first, running_stream(first):
            waiting = pool.submit(Ask(second, stream=stream).complete)
            keyed_server.wait_for_metric("mixserve_num_requests_waiting", 1, seconds=2, key=KEYS[0])
            with keyed(keyed_server, KEYS[2]) as third, pytest.raises(openai.InternalServerError) as caught:
                Ask(third, stream=stream).complete()
            assert (caught.value.status_code, caught.value.code) == (503, "server_overloaded")
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert not waiting.done()
        assert waiting.result(30).choices


def test_an_error_in_the_midst_of_a_stream_is_its_last_event(long_checkpoint: Path) -> None:
    """The engine process is killed while two streams run, of the client and by hand."""
    with running_server(str(long_checkpoint), "--served-model-name", MODEL) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        body = {key: value for key, value in LONG.items() if key != "extra_body"} | LONG["extra_body"]
        with (
            client.completions.create(**LONG, stream=True) as stream,
            httpx.stream("POST", f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=30) as raw,
        ):
            chunks, lines = iter(stream), raw.iter_lines()
            next(chunks), next(lines)
            server.engine_process().kill()
            with pytest.raises(openai.APIError) as caught:
                for _ in chunks:
                    pass
            assert not isinstance(caught.value, openai.APIConnectionError)
            assert caught.value.code == "engine_dead"
            *_, last = [line for line in lines if line]
            assert last.startswith('data: {"error":{"message":'), "no [DONE]"
        client.close()
