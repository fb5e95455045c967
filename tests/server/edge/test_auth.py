"""Keys: every path is closed but the listed ones, whatever the request says of itself."""

from __future__ import annotations

import http.client
import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from server.edge.auth import OPEN_PATHS, Auth, is_open
from server.edge.keys import ApiKey
from server.edge.paths import RootPath
from tests.checked_responses import check_response
from tests.e2e.raw import exchange, head, post
from tests.server.edge.asgi import call
from tests.server.edge.conftest import KEY, OTHER_KEY, metric
from tests.server.harness import Live, error_of

Value = str | bytes
GOOD = json.dumps({"prompt": "Hi"}).encode()


def bearer(key: Value) -> tuple[str, Value]:
    return ("Authorization", b"Bearer " + (key if isinstance(key, bytes) else key.encode()))


def routes_of(routes: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Method and path of each, those of included routers too."""
    for route in routes:
        if hasattr(route, "original_router"):
            yield from routes_of(route.original_router.routes)
        else:
            yield from ((method, route.path) for method in route.methods)


def status_of(live: Live, method: str, path: str, key: str | None = None) -> int:
    connection = http.client.HTTPConnection(live.url.removeprefix("http://"), timeout=10)
    connection.request(method, path, headers={} if key is None else {"Authorization": f"Bearer {key}"})
    with closing(connection), connection.getresponse() as response:
        headers = {name.lower(): value for name, value in response.getheaders()}
        endless = headers["content-type"].startswith("text/event-stream")
        content = response.readline() + response.readline() if endless else response.read()
        if method != "HEAD":
            check_response(path, response.status, headers, content, whole=not endless)
        return response.status


def test_every_route_of_the_app_is_closed_but_the_open_ones(locked: Live) -> None:
    app = locked.app
    routes = sorted(set(routes_of(app.routes)))
    assert {("POST", "/v1/completions"), ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/health")} < {*routes}
    for method, route in routes:
        path = (
            route.replace("{name}", "index.html")
            .replace("{name:path}", "index.html")
            .replace("{model_id:path}", "fake")
        )
        assert "{" not in path, f"say here what to ask for: {path}"
        without = status_of(locked, method, path)
        opened = method in ("GET", "HEAD") and (path in OPEN_PATHS or path.startswith(("/docs/", "/page/")))
        assert (without != 401) == opened, f"{method} {path}"
        assert status_of(locked, method, path, KEY) not in (401, 405)


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_the_open_paths(locked: Live, path: str) -> None:
    for method in ("GET", "HEAD"):
        assert status_of(locked, method, path) != 401
    assert error_of(locked.client.post(path), 401)["code"] == "invalid_api_key"
    assert error_of(locked.client.request("OPTIONS", path), 401)["code"] == "invalid_api_key"


def test_the_page_of_the_docs_can_load_all_of_itself(locked: Live) -> None:
    from server.routes.docs import _FOLDER

    names = [file.name for file in _FOLDER.iterdir()]
    assert len(names) > 2
    for name in names:
        assert is_open("GET", f"/docs/{name}")
        assert status_of(locked, "GET", f"/docs/{name}") == 200


@pytest.mark.parametrize(
    "path",
    [
        *("", "health", "//", "//health", "/health/", "/health/..", "/Health", "/health?", "/health#", "/health\n"),
        *("/docs/", "/docs//x", "/docs/../v1/models", "/docs/./x", "/docs/.env", "/docs/x/..", "/docs/x/../.."),
        *("/docsx", "/docs/a\nb", "/docs/é", "/docs/a b", "/docs/a%2fb", "/openapi.json/", "/version\0", "/metrics"),
    ],
)  # fmt: skip
def test_what_only_looks_open(path: str) -> None:
    assert not is_open("GET", path)


@pytest.mark.parametrize(
    "request_bytes",
    [
        head("GET", "/v1/models", ("Host", "x/health?")),
        head("GET", "/v1/models", ("Host", "x/docs/")),
        head("GET", "//v1/models"),
        head("GET", "/V1/models"),
        head("GET", "/health/../v1/models"),
        head("GET", "/docs/../v1/models"),
        head("GET", "/docs/%2e%2e/v1/models"),
        head("GET", "/v1/models?/health"),
        head("GET", "http://x/v1/models"),
        head("GET", "/v1/nothing"),
        head("OPTIONS", "/v1/completions", ("Origin", "http://x"), ("Access-Control-Request-Method", "POST")),
        post("//v1/completions", GOOD),
        post("/v1/completions", GOOD, ("X-Forwarded-Prefix", "/health"), ("X-Original-URL", "/health")),
        post("/v1/completions", GOOD, bearer("")),
        post("/v1/completions", GOOD, bearer(KEY[:-1])),
        post("/v1/completions", GOOD, bearer(KEY + "x")),
        post("/v1/completions", GOOD, bearer(KEY.encode() + b"\xff")),
        post("/v1/completions", GOOD, bearer(KEY), bearer(KEY)),
        post("/v1/completions", GOOD, bearer("wrong"), bearer(KEY)),
        post("/v1/completions", GOOD, ("Authorization", KEY)),
        post("/v1/completions", GOOD, ("Authorization", f"Basic {KEY}")),
        post("/v1/completions", GOOD, ("X-Api-Key", KEY)),
        post(f"/v1/completions?api_key={KEY}", GOOD),
    ],
    ids=lambda request: " ".join(request.decode("latin-1").split("\r\n")[::4])[:70],
)
def test_closed(locked: Live, request_bytes: bytes) -> None:
    answer = exchange(locked.url, [request_bytes])
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.headers["x-request-id"].startswith("req_")
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    assert KEY not in error["message"]


def test_a_head_of_what_is_closed_is_closed(locked: Live) -> None:
    assert status_of(locked, "HEAD", "/v1/models") == 401


@pytest.mark.parametrize("value", [f"Bearer {KEY}", f"bearer {KEY}", f"BEARER   {KEY} ", f"Bearer {OTHER_KEY}"])
def test_each_key_opens(locked: Live, value: str) -> None:
    request = post("/v1/completions", GOOD, ("Authorization", value))
    assert exchange(locked.url, [request]).status_code == 200


def test_an_unknown_path_is_404_to_who_has_a_key(locked: Live) -> None:
    answer = exchange(locked.url, [head("GET", "/v1/nothing%0a?x", ("Host", "x/health?"), bearer(KEY))])
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "There is no GET /v1/nothing%0A."


def test_nothing_of_a_body_is_read_without_a_key(locked: Live) -> None:
    request = head("POST", "/v1/completions", ("Content-Length", "1000"), ("Expect", "100-continue"))
    assert exchange(locked.url, [request]).status_code == 401


def test_refusals_are_counted(locked: Live) -> None:
    def count() -> float:
        return metric(locked, 'requests_rejected_total{model_name="org/fake-model",reason="invalid_api_key"}', key=KEY)

    locked.client.get("/v1/models")
    before = count()
    locked.client.get("/v1/models")
    assert count() == before + 1


def test_without_keys_all_is_open(server: Live) -> None:
    assert server.client.get("/v1/models").status_code == 200
    assert server.client.get("/metrics", headers={"Authorization": "Bearer whatever"}).status_code == 200


def test_no_key_is_ever_logged(locked: Live, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        for header in (bearer(KEY), bearer(KEY + "x"), ("Authorization", KEY), ("X-Api-Key", KEY)):
            for request in (
                post("/v1/completions", GOOD, header),
                post("/v1/completions", b"{", header),
                post(f"/v1/completions?key={KEY}", GOOD, header),
                head("GET", "/v1/models", header, ("Bad header", "x")),
            ):
                exchange(locked.url, [request])
    time.sleep(0.1)  # the last line is written after the answer
    assert "server.access" in caplog.text
    assert KEY not in caplog.text


async def tells(scope: Scope, _: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(scope["state"]).encode()})


def auth(*keys: str) -> Auth:
    return Auth(tells, [ApiKey.of(key) for key in keys], lambda _: None)


def test_whose_request_it_is_is_noted() -> None:
    for key in ("a", "b"):
        _, body = call(auth("a", "b"), path="/x", headers=[(b"authorization", b"Bearer " + key.encode())])
        assert json.loads(body["body"]) == {"key_id": ApiKey.of(key).id}


@pytest.mark.parametrize("path", ["/mixserve/health", "/health"])
def test_behind_a_proxy_that_keeps_or_takes_the_prefix(path: str) -> None:
    app = RootPath(auth("a"), "/mixserve")
    assert call(app, method="GET", path=path)[0]["status"] == 200


@pytest.mark.parametrize(
    "path",
    ["/mixserve", "/mixserve/v1/models", "/v1/models", "/mixserve/mixserve/health", "/mixservehealth", "/x/health"],
)
def test_behind_a_proxy_the_rest_stays_closed(path: str) -> None:
    assert call(RootPath(auth("a"), "/mixserve"), method="GET", path=path)[0]["status"] == 401


def test_nothing_but_http_comes_in() -> None:
    assert call(auth("a"), path="/v1/completions", type="websocket") == []
