"""Many open pages, and what is left of their streams."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from playwright.sync_api import expect

from tests.e2e.browser.watched import Pages
from tests.e2e.running import Server, running_server

CELLS = "#heatmap [role=gridcell][data-expert]"
EVENTS = "/v1/experts/events"


def test_ten_open_pages_end_with_the_server(pages: Pages, checkpoint: Path) -> None:
    with running_server(str(checkpoint)) as server:
        engine = server.engine_process()
        opened = [pages.open(server.url, expected="Failed to load resource") for _ in range(10)]
        for watched in opened:
            expect(watched.page.locator(CELLS)).to_have_count(24)
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - begin < 5, "open pages do not hold the server up"
        assert not engine.is_running()
        assert "Traceback" not in server.log_text()
        for watched in opened:
            expect(watched.page.get_by_role("alert")).to_have_attribute("data-kind", "offline")


def test_a_hidden_page_leaves_its_stream(pages: Pages, server: Server) -> None:
    """A browser has six connections to a host: a seventh open tab must get through."""
    watched = pages.open(server.url)
    page = watched.page
    expect(page.locator(CELLS)).to_have_count(24)
    with page.expect_event("requestfailed", lambda request: request.url.endswith(EVENTS)):
        page.evaluate(_SET_HIDDEN, True)
    with page.expect_request(lambda request: request.url.endswith(EVENTS)):
        page.evaluate(_SET_HIDDEN, False)
    expect(page.locator("#alert")).to_be_hidden()


_SET_HIDDEN = """hidden => {
    Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
    Object.defineProperty(document, "visibilityState", {value: hidden ? "hidden" : "visible", configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""
