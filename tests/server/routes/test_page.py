"""GET /: the page and its files, which load and ask nothing elsewhere. What they show is tested in a browser."""

from __future__ import annotations

import re
from pathlib import Path

import httpx2
import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from server.routes.page import FOLDER
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, Live, error_of, live_server

FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def test_the_page_and_all_that_it_names(server: Live) -> None:
    page = server.client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    named = re.findall(r'(?:src|href)="([^"#]+)"', page.text)
    assert "page/" in str(named)
    for url in named:
        assert not url.startswith(("/", "http")), f"{url} is not found behind a proxy's prefix"
        if not url.startswith("data:"):
            assert server.client.get(f"/{url}").status_code == 200, url


def test_nothing_in_it_is_inline(server: Live) -> None:
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", server.client.get("/").text)


@pytest.mark.parametrize("name", FILES)
def test_every_file(server: Live, name: str) -> None:
    response = server.client.get(f"/page/{name}")
    assert response.status_code == 200
    assert response.content == (FOLDER / name).read_bytes()
    kind = TYPES.get(Path(name).suffix)
    assert kind is None or response.headers["content-type"].partition(";")[0] == kind
    check_headers(response)


def check_headers(response: httpx2.Response) -> None:
    assert response.headers["content-security-policy"] == POLICY
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


def test_head_and_what_a_browser_has(server: Live) -> None:
    for path in ("/", f"/page/{FILES[0]}"):
        whole, answer = server.client.get(path), server.client.head(path)
        assert (answer.status_code, answer.content) == (200, b"")
        assert answer.headers["content-length"] == whole.headers["content-length"]
        check_headers(answer)
        known = server.client.build_request("HEAD", path, headers={"If-None-Match": whole.headers["etag"]})
        again = server.client.send(known)
        assert (again.status_code, again.content) == (304, b"")
        check_headers(again)


@pytest.mark.parametrize(
    "path",
    [
        *("/index.html", "/page", "/page/", "/page/nothing", "/page/%2e%2e/swagger/init.js", "/page/%2findex.html"),
        *("/page/%00", "/page/index.html/", "/favicon.ico", "/page/" + "a" * 3000),
    ],
)  # fmt: skip
def test_other_paths(server: Live, path: str) -> None:
    error_of(server.client.get(path), 404)


def test_other_methods(server: Live) -> None:
    error_of(server.client.post("/"), 405)
    error_of(server.client.delete("/page/index.html"), 405)


def test_it_is_open_and_lies_under_the_prefix(tokenizer: Tokenizer) -> None:
    edge = EdgeConfig(api_keys=(ApiKey.of("sk-1"),), root_path="/mixserve")
    config = ServerConfig(served_model_name=MODEL, edge=edge)
    with live_server(lambda: FakeEngine(lambda _: []), tokenizer, config) as live:
        for prefix in ("", "/mixserve"):
            for path in ("/", *(f"/page/{name}" for name in FILES)):
                assert live.client.get(prefix + path).status_code == 200, path
                assert live.client.head(prefix + path).status_code == 200, path
            error_of(live.client.get(f"{prefix}/v1/experts/events"), 401)
