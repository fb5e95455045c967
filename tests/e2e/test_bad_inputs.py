"""Bad requests (rows H1, H2, H6 to H15), each beside four good streams that do not change."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.e2e.bad_cases import CASES, CHAT, COMPLETIONS, MODEL, TOKENIZE, TURNS, Case
from tests.e2e.error_answers import check_error
from tests.e2e.good_streams import GoodStreams, unharmed
from tests.e2e.raw import exchange, head
from tests.e2e.running import Server, running_server

QUICK = 5.0
"""Seconds that a refusal may take on a busy machine; an explosion of work or memory takes longer."""


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    template = tmp_path_factory.mktemp("template") / "turns.jinja"
    template.write_text(TURNS)
    options = ("--served-model-name", MODEL, "--dtype", "float32", "--chat-template", str(template))
    with running_server(str(tiny_checkpoint), *options) as server:
        yield server


@pytest.fixture(scope="module")
def streams(server: Server) -> Iterator[GoodStreams]:
    with unharmed(server, MODEL) as streams:
        yield streams


@pytest.fixture(scope="module")
def client(server: Server, streams: GoodStreams) -> Iterator[httpx.Client]:
    del streams  # they run before, and end after it
    with httpx.Client(base_url=server.url, timeout=QUICK) as client:
        yield client


@pytest.fixture(autouse=True)
def _nobody_notices(streams: GoodStreams, client: httpx.Client) -> Iterator[None]:
    yield
    streams.check()
    assert client.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(client: httpx.Client, case: Case) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.request(case.method, case.path, content=case.body, headers=headers)
    error = check_error(response, case.status, param=case.param, code=case.code)
    for part in case.in_message:
        assert part in error["message"]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, TOKENIZE])
def test_a_null_character_is_text(client: httpx.Client, path: str) -> None:
    """H10."""
    body = {"messages": [{"role": "user", "content": "a\0b"}]} if path == CHAT else {"prompt": "a\0b"}
    assert client.post(path, json={"model": MODEL, "max_tokens": 3} | body).status_code == 200


@pytest.mark.parametrize("content", ["content", "parts"])
def test_an_emoji_in_escapes_is_text(client: httpx.Client, content: str) -> None:
    """Two surrogates that belong together."""
    text = r'"\ud83d\ude00"' if content == "content" else r'[{"type": "text", "text": "\ud83d\ude00"}]'
    body = f'{{"max_tokens": 3, "messages": [{{"role": "user", "content": {text}}}]}}'
    response = client.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("target", ["/v1/models/../../x", "/v1/models/..%2f..%2fx", "/v1/models/%2e%2e/%2e%2e/x"])
def test_a_model_that_is_a_path(server: Server, target: str) -> None:
    """H7: as the target of a request too, which a client library would tidy up."""
    answer = exchange(server.url, [head("GET", target)])
    error = check_error(answer, 404, param=answer.json()["error"]["param"], code=answer.json()["error"]["code"])
    assert "No such file" not in error["message"]


def test_no_file_is_touched(client: httpx.Client, tmp_path: Path) -> None:
    """H7: whoever opened this model's config.json would wait for its writer for ever."""
    os.mkfifo(tmp_path / "config.json")
    os.mkfifo(tmp_path / "tokenizer.json")
    for model in (str(tmp_path), str(tmp_path / "config.json"), os.path.relpath(tmp_path)):
        for response in (
            client.post(COMPLETIONS, json={"model": model, "prompt": "Hi"}),
            client.get(f"/v1/models/{quote(model, safe='')}"),
            client.post("/tokenize", json={"model": model, "prompt": "Hi"}),
        ):
            check_error(response, 404, param="model", code="model_not_found")


PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": "URL"}},
    {"type": "image_url", "image_url": "URL"},
    {"type": "input_audio", "input_audio": {"data": "URL", "format": "wav"}},
    {"type": "video_url", "video_url": {"url": "URL"}},
    {"type": "file", "file": {"file_data": "URL"}},
    {"type": "text", "image_url": {"url": "URL"}},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("part", PARTS, ids=lambda part: str(part)[:40])
def test_nothing_is_fetched(client: httpx.Client, part: dict[str, Any], stream: bool) -> None:
    """H14: the part's address is a socket that nobody may connect to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        content = [{"type": "text", "text": "Look"}, json.loads(json.dumps(part).replace("URL", url))]
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "stream": stream}
        check_error(client.post(CHAT, json=body), 400, param="messages", code=None)
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()


def test_a_good_request_is_served_all_the_while(client: httpx.Client) -> None:
    """What every case differs from in one thing."""
    assert client.post(COMPLETIONS, json={"model": MODEL, "prompt": "Hi", "max_tokens": 5}).status_code == 200
    messages = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    assert client.post(CHAT, json={"model": MODEL, "messages": messages, "max_tokens": 5}).status_code == 200
