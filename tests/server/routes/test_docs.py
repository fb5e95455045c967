"""GET /docs: a page whose every part comes from this server."""

from __future__ import annotations

import hashlib
import http.client
import re
from pathlib import Path

import pytest

import server as package
from tests.server.harness import Live, error_of

FOLDER = Path(package.__file__).parent / "static" / "swagger"
THEIRS = {
    "LICENSE": "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30",
    "NOTICE": "0d20d1adef18aee3f40dd258172155521ce702ac445cb5f7b7d60ed32dad2fb2",
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui-bundle.js.LICENSE.txt": "37eb6e7e59aed57b2c1acf076574b818ea07b74265717e0bd67b59e0baf9abbb",
    "swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
}
"""SHA-256 of the files of swagger-ui-dist 5.35.0."""


def test_the_page_and_all_that_it_loads(server: Live) -> None:
    page = server.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "X-Request-Id" in page.headers
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert loaded == ["docs/swagger-ui.css", "data:,", "docs/swagger-ui-bundle.js", "docs/init.js"]
    types = {"css": "text/css", "js": "text/javascript"}
    for name in loaded:
        if not name.startswith("data:"):
            response = server.client.get(f"/{name}")
            assert response.status_code == 200
            assert response.headers["content-type"] == f"{types[name.rpartition('.')[2]]}; charset=utf-8"
    script = server.client.get("/docs/init.js").text
    assert re.findall(r"url: \"(.*)\"", script) == ["openapi.json"]
    assert "//" not in re.sub("^//.*", "", script, flags=re.MULTILINE)


def test_the_page_may_load_and_ask_nothing_elsewhere(server: Live) -> None:
    for path in ("/docs", "/docs/init.js"):
        policy = server.client.get(path).headers["content-security-policy"].split("; ")
        assert policy[0] == "default-src 'none'"
        assert {"script-src 'self'", "style-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"} < set(policy)
        assert "unsafe" not in str(policy)
    assert not re.search(r"<script(?! src=)|<style|style=| on\w+=", server.client.get("/docs").text), "inline"


@pytest.mark.parametrize("name", THEIRS)
def test_files_of_others_are_as_they_made_them(server: Live, name: str) -> None:
    response = server.client.get(f"/docs/{name}")
    assert hashlib.sha256(response.content).hexdigest() == THEIRS[name]


def test_nothing_else_lies_there() -> None:
    assert {path.name for path in FOLDER.iterdir()} == THEIRS.keys() | {"index.html", "init.js"}


def test_what_a_browser_has_is_not_sent_again(server: Live) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=10)
    try:
        etag = server.client.get("/docs/swagger-ui.css").headers["etag"]
        connection.request("GET", "/docs/swagger-ui.css", headers={"If-None-Match": etag})
        response = connection.getresponse()
        assert (response.status, response.read()) == (304, b"")
    finally:
        connection.close()


OTHERS = ["", "nothing", "%2e%2e", "%2e%2e/%2e%2e/app.py", "..%2f..%2fapp.py", "%00", "a" * 3000]


@pytest.mark.parametrize("path", ["/redoc", *(f"/docs/{name}" for name in OTHERS)])
def test_other_paths(server: Live, path: str) -> None:
    error_of(server.client.get(path), 404)


def test_other_methods(server: Live) -> None:
    error_of(server.client.post("/docs"), 405)
    error_of(server.client.delete("/docs/init.js"), 405)
