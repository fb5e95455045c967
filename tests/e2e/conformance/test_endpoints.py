"""Every endpoint of API.md, and the headers of its answers."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.e2e.conformance.asking import MODEL, Ask
from tests.e2e.conformance.conftest import KEYS
from tests.e2e.running import Server

OPEN = ["/health", "/ready", "/version", "/docs", "/openapi.json"]
CLOSED = ["/v1/models", f"/v1/models/{MODEL}", "/metrics", "/v1/experts", "/v1/experts/what_if?capacity_factor=1"]


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> Any:
    """To a path outside /v1."""
    root = client.with_options(base_url=str(client.base_url).removesuffix("v1/"))
    return root.post(path, cast_to=object, body=body)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "mixserve")
    assert model == client.models.retrieve(MODEL)
    assert model.model_dump()["max_model_len"] == 2048


@pytest.mark.parametrize(
    ("text", "ids"), [("", []), ("Hi", [72, 105]), ("é<|im_end|>", [195, 169, 259]), ("\x00", [0])], ids=ascii
)
def test_tokenize_and_back(client: openai.OpenAI, text: str, ids: list[int]) -> None:
    found = post(client, "/tokenize", {"model": MODEL, "prompt": text})
    assert found == {"count": len(ids), "max_model_len": 2048, "tokens": ids, "token_strs": None}
    assert post(client, "/detokenize", {"model": MODEL, "tokens": ids}) == {"prompt": text}


def test_tokenize_messages_counts_what_a_chat_reads(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    found = post(client, "/tokenize", {"model": MODEL, "messages": messages})
    chat = Ask(client, stream=False).chat(messages=messages, max_tokens=1)
    assert found["count"] == len(found["tokens"]) == chat.usage.prompt_tokens


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [260]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_tokenize_refuses(client: openai.OpenAI, path: str, body: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        post(client, path, body)
    assert caught.value.param == param


def test_tokenize_knows_one_model(client: openai.OpenAI) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})):
        with pytest.raises(openai.NotFoundError) as caught:
            post(client, path, body | {"model": "gpt-4o"})
        assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("path", OPEN + CLOSED)
def test_answers_on(server: Server, path: str) -> None:
    response = httpx.get(f"{server.url}{path}")
    assert response.status_code == 200
    assert response.headers["x-request-id"]


def test_experts_can_be_reset(server: Server) -> None:
    assert httpx.post(f"{server.url}/v1/experts/reset").json() == {"status": "reset"}


@pytest.mark.parametrize("path", OPEN)
def test_open_without_a_key(keyed_server: Server, path: str) -> None:
    assert httpx.get(f"{keyed_server.url}{path}").status_code == 200


@pytest.mark.parametrize("path", [*CLOSED, "/v1/completions", "/v1/nothing", "//v1/models", "/v1/models/"])
def test_closed_without_a_key(keyed_server: Server, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEYS[0]}"}):
        response = httpx.get(f"{keyed_server.url}{path}", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/chat/completions", "/v1/experts/reset"])
def test_posts_are_closed_without_a_key(keyed_server: Server, path: str) -> None:
    assert httpx.post(f"{keyed_server.url}{path}", json={}).status_code == 401


@pytest.mark.parametrize("key", KEYS)
def test_with_a_key(keyed_server: Server, key: str) -> None:
    for path in CLOSED:
        response = httpx.get(f"{keyed_server.url}{path}", headers={"Authorization": f"Bearer {key}"})
        assert response.status_code == 200


def test_request_ids_go_in_and_out(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hi"}]
    mine = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert mine._request_id == "mine-1"
    others = {client.completions.create(model=MODEL, prompt="Hi", max_tokens=1)._request_id for _ in range(3)}
    assert len(others) == 3
    assert None not in others
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt="Hi", max_tokens=1, extra_headers={"X-Request-Id": "no spaces allowed"}
    )
    assert raw.headers["x-request-id"] not in ("", "no spaces allowed")


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)])
def test_unknown_paths_and_methods(server: Server, method: str, path: str, status: int) -> None:
    response = httpx.request(method, f"{server.url}{path}")
    assert response.status_code == status
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_metrics_have_the_documented_names(server: Server) -> None:
    text = httpx.get(f"{server.url}/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "prompt_tokens_total",
        "generation_tokens_total",
    ):
        assert f'mixserve_{name}{{model_name="{MODEL}"}}' in text
    for name in ("request_success_total", "requests_rejected_total", "requests_aborted_total", "expert_tokens_total"):
        assert f"# TYPE mixserve_{name.removesuffix('_total')}" in text
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert f"mixserve_{name}_seconds_count" in text
