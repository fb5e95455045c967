"""What goes wrong is said plainly, and the page comes back by itself."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import tokenizers
from playwright.sync_api import Page, expect

from engine.text import Tokenizer
from server.config import ServerConfig
from tests.e2e.browser.asking import last_answer, put_controls, send, text_of, wait_done
from tests.e2e.browser.watched import Pages
from tests.e2e.running import free_port, running_server
from tests.server.fake_engine import FakeEngine, fake_info
from tests.server.harness import live_server
from tests.tiny_tokenizer import write_byte_tokenizer

REFUSED = r"Failed to load resource"
"""How Chromium itself tells of an answer that is no success."""


def expect_alert(page: Page, kind: str, text: str) -> None:
    alert = page.get_by_role("alert")
    expect(alert).to_be_visible()
    expect(alert).to_have_attribute("data-kind", re.compile(kind))
    expect(alert).to_contain_text(re.compile(text, re.IGNORECASE))


def test_a_dead_engine(pages: Pages, checkpoint: Path, servers: ExitStack) -> None:
    server = servers.enter_context(running_server(str(checkpoint)))
    page = pages.open(server.url, expected=REFUSED).page
    put_controls(page, max_tokens=1500)
    send(page, "A long story")
    answer = last_answer(page, "plain")
    expect(answer.locator("[data-token]").first).to_be_attached()
    server.engine_process().kill()
    expect(answer).to_have_attribute("data-state", "error")
    expect_alert(page, "dead|offline", "engine|reach|connect")
    said = page.get_by_role("alert").text_content()
    assert "Traceback" not in (said or "")
    server.process.wait(20)
    expect_alert(page, "offline", "reach|connect")
    assert len(text_of(answer)) > 0, "what had come of it is still there"
    send(page, "Hello?")
    expect(last_answer(page, "plain")).to_have_attribute("data-state", "error")


def test_a_wrong_key(pages: Pages, checkpoint: Path, servers: ExitStack) -> None:
    server = servers.enter_context(
        running_server(str(checkpoint), "--served-model-name", "secret-name", "--api-key", "open-sesame")
    )
    watched = pages.open(server.url, expected="status of 401")
    page = watched.page
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    assert "secret-name" not in page.content()
    expect(page.locator("#heatmap [role=gridcell][data-expert]")).to_have_count(0)
    assert watched.accessibility_faults() == []
    page.get_by_label("API key", exact=True).last.fill("wrong")
    page.get_by_role("button", name="Use key").click()
    expect(dialog).to_contain_text(re.compile("wrong|does not know"))
    page.get_by_label("API key", exact=True).last.fill("open-sesame")
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#heatmap [role=gridcell][data-expert]")).to_have_count(24)
    expect(page.locator("#alert")).to_be_hidden()
    expect(page.locator("body")).to_contain_text("secret-name")
    put_controls(page)
    send(page, "Hello?")
    wait_done(last_answer(page, "plain"))
    assert not [request.url for request in watched.requests if "sesame" in request.url]
    for request in watched.requests:
        assert "/v1/" in request.url or "authorization" not in request.headers


@contextlib.contextmanager
def fake_server(port: int, load_seconds: float) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.server.serve_fake", str(port), str(load_seconds), "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            finally:
                process.kill()


def test_a_server_that_loads_leaves_and_comes_back(pages: Pages) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    with fake_server(port, 4):
        wait_for_page(url)
        page = pages.open(url, expected=REFUSED).page
        expect_alert(page, "loading", "load")
        expect(page.locator("#alert")).to_be_hidden()
        expect(page.locator("#heatmap [role=gridcell][data-expert]")).to_have_count(16)
    expect_alert(page, "offline", "reach|connect")
    with fake_server(port, 0):
        expect(page.locator("#alert")).to_be_hidden(timeout=30_000)
        put_controls(page)
        send(page, "Are you there?")
        expect(last_answer(page, "plain")).to_have_attribute("data-state", "running")


def wait_for_page(url: str) -> None:
    """Until the server listens."""
    for _ in range(200):
        with contextlib.suppress(httpx.TransportError):
            httpx.get(url)
            return
        time.sleep(0.1)
    raise AssertionError("the server does not listen")


def test_routing_that_is_not_recorded(pages: Pages, tokenizer: Tokenizer, servers: ExitStack) -> None:
    """The rest of the page works."""
    ids = tokenizer.encode("Yes.", add_special_tokens=False)
    info = replace(fake_info(), record_routing=False)
    live = servers.enter_context(live_server(lambda: FakeEngine(lambda _: ids, info=info), tokenizer))
    page = pages.open(live.url).page
    put_controls(page)
    expect(page.locator("body")).to_contain_text("--no-record-routing")
    expect(page.locator('[data-figure="running"]')).to_have_text("0")
    send(page, "Are you there?")
    assert text_of(wait_done(last_answer(page, "plain"))) == " Yes."


def test_an_answer_that_breaks(pages: Pages, tokenizer: Tokenizer, servers: ExitStack) -> None:
    live = servers.enter_context(live_server(lambda: FakeEngine(lambda _: [5] * 20, fail_at=4), tokenizer))
    page = pages.open(live.url, expected=REFUSED).page
    put_controls(page)
    send(page, "Are you there?")
    answer = last_answer(page, "plain")
    expect(answer).to_have_attribute("data-state", "error")
    expect(answer).not_to_contain_text("secret detail")


def test_a_server_that_is_full(pages: Pages, tokenizer: Tokenizer, servers: ExitStack) -> None:
    live = servers.enter_context(live_server(lambda: FakeEngine(lambda _: [5], max_waiting=0), tokenizer))
    page = pages.open(live.url, expected="status of 503").page
    put_controls(page)
    send(page, "Are you there?")
    answer = last_answer(page, "plain")
    expect(answer).to_have_attribute("data-state", "error")
    expect(answer).to_contain_text("too many requests wait")


NASTY = (
    "<script>window.broken = 1</script>",
    "<img src=x onerror='window.broken = 2'>",
    "<svg onload='window.broken = 3'></svg>",
    "<a href='javascript:window.broken = 4'>x</a>",
    "&lt;b&gt;",
)


@pytest.fixture
def nasty_tokenizer(tmp_path: Path) -> Tokenizer:
    """Of bytes, and of NASTY, each a token of its own."""
    write_byte_tokenizer(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    inner = tokenizers.Tokenizer.from_file(file)
    inner.add_tokens(list(NASTY))
    inner.save(file)
    return Tokenizer.load(tmp_path)


@pytest.mark.parametrize("steered", [False, True])
def test_text_is_text(pages: Pages, nasty_tokenizer: Tokenizer, steered: bool, servers: ExitStack) -> None:
    """Of the model, of the user, of the model's name, and of a token whose experts are shown."""
    ids = nasty_tokenizer.encode("".join(NASTY), add_special_tokens=False)
    assert len(ids) == len(NASTY)
    config, info = ServerConfig(served_model_name="".join(NASTY)), fake_info(max_model_len=4096)
    live = servers.enter_context(live_server(lambda: FakeEngine(lambda _: ids, info=info), nasty_tokenizer, config))
    page = pages.open(live.url).page
    put_controls(page, max_tokens=len(NASTY))
    if steered:
        page.get_by_label("Two answers side by side").check()
        page.locator("#experts-per-token").select_option("1")
    send(page, "".join(NASTY))
    for kind in ("steered", "plain") if steered else ("plain",):
        answer = wait_done(last_answer(page, kind))
        assert text_of(answer) == "".join(NASTY)
        for index, text in enumerate(NASTY):
            answer.locator(f'[data-token="{index}"]').click()
            expect(page.locator("#trace")).to_contain_text(text)
    expect(page.locator("#turns")).to_contain_text("".join(NASTY))
    expect(page.locator("#model")).to_have_text("".join(NASTY))
    send(page, "And again?")
    wait_done(last_answer(page, "plain"))
    assert page.evaluate("window.broken ?? null") is None
    assert page.locator("main script, #turns img, #turns svg, #turns a, #trace img, h1 *:not(#model)").count() == 0
