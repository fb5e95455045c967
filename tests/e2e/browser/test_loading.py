"""The page comes whole, from this server alone, under a strict policy."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import expect

from tests.e2e.browser.asking import last_answer, put_controls, send, wait_done
from tests.e2e.browser.watched import Pages
from tests.e2e.running import Server, running_server

STRICT = {
    "default-src": {"'none'"},
    "script-src": {"'self'"},
    "style-src": {"'self'"},
    "connect-src": {"'self'"},
    "base-uri": {"'none'"},
    "form-action": {"'none'"},
    "frame-ancestors": {"'none'"},
}


def test_it_loads(pages: Pages, server: Server) -> None:
    """Console errors, violations of the policy and requests elsewhere fail any test with `pages`, so this one too."""
    watched = pages.open(server.url)
    expect(watched.page.locator("#heatmap [role=gridcell][data-expert]")).to_have_count(3 * 8)
    expect(watched.page.locator("#alert")).to_be_hidden()
    assert watched.page.title()
    for request in watched.requests:
        response = request.response()
        assert response is not None
        assert response.status == 200, request.url
    paths = {urlsplit(request.url).path for request in watched.requests}
    assert {"/", "/v1/experts/events"} < paths
    for path in paths - {"/v1/experts/events"}:
        headers = httpx.get(f"{server.url}{path}").headers
        if not path.startswith("/v1/"):
            check_policy(headers["content-security-policy"])
            assert headers["x-content-type-options"] == "nosniff"


def check_policy(text: str) -> None:
    policy = {name: set(values) for name, *values in (part.split() for part in text.split(";"))}
    assert policy.items() >= STRICT.items()
    assert not {value for values in policy.values() for value in values} - {"'none'", "'self'", "data:"}


def test_what_a_violation_looks_like(pages: Pages, server: Server) -> None:
    """The tests see one: without this, a page without any would prove nothing."""
    watched = pages.open(server.url)
    watched.page.evaluate(
        "document.body.append(Object.assign(document.createElement('img'), {src: 'http://a.test/b'}))"
    )
    watched.page.wait_for_function("window.violationsSeen.length")
    console, request, violation = watched.problems()
    assert "violates the following Content Security Policy" in console
    assert request == "a request to http://a.test/b"
    assert violation.startswith("violation of the policy: img-src http://a.test/b")
    pages.opened.remove(watched)
    watched.page.context.close()


def test_under_a_prefix(pages: Pages, checkpoint: Path, servers: ExitStack) -> None:
    server = servers.enter_context(running_server(str(checkpoint), "--root-path", "/models/one"))
    pages.open(f"{server.url}/models/one/")
    page = pages.open(f"{server.url}/models/one").page  # without the slash that relative links need
    for watched in pages.opened:
        expect(watched.page.locator("#heatmap [role=gridcell][data-expert]")).to_have_count(3 * 8)
    put_controls(page)
    send(page, "Hi")
    wait_done(last_answer(page, "plain"))


@pytest.mark.parametrize("path", ["/page/../routes/experts.py", "/page/%2e%2e/cli.py", "/page/nothing.js"])
def test_nothing_else_is_served(server: Server, path: str) -> None:
    assert httpx.get(f"{server.url}{path}").status_code == 404
