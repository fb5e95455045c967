"""The live figures are those of the API, while requests run and after."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from engine.text import Tokenizer
from tests.e2e.browser.asking import eventually
from tests.e2e.browser.watched import Pages
from tests.e2e.running import Server
from tests.server.fake_engine import FakeEngine
from tests.server.harness import live_server

LAYERS, EXPERTS = 3, 8
EVEN = pytest.approx([1] * LAYERS, abs=0.01)
A_NUMBER = re.compile(r"\d")


def generate(server: Server, **fields: Any) -> None:
    body = {"prompt": "a long story", "max_tokens": 60, "ignore_eos": True, "temperature": 0} | fields
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200


@contextmanager
def busy(server: Server) -> Iterator[None]:
    """Two requests always run until the block ends."""
    stop = threading.Event()

    def go_on(prompt: str) -> None:
        while not stop.is_set():
            generate(server, prompt=prompt, max_tokens=500)

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(go_on, prompt) for prompt in ("one", "two")]
        try:
            yield
        finally:
            stop.set()
    for future in running:
        future.result()


def report(server: Server) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/experts").json()
    return found


def shown_cells(page: Page) -> list[list[float]]:
    """By layer and expert."""
    cells: list[list[float]] = page.locator("#heatmap [role=gridcell][data-expert]").evaluate_all(
        "cells => cells.map(({dataset}) => [dataset.layer, dataset.expert, dataset.value].map(Number))"
    )
    found = [[-1.0] * EXPERTS for _ in range(LAYERS)]
    for layer, expert, value in cells:
        found[int(layer)][int(expert)] = value
    return found


def shown_bars(page: Page, name: str) -> list[float]:
    bars: list[list[float]] = page.locator(f'#heatmap [data-bar="{name}"]').evaluate_all(
        "bars => bars.map(({dataset}) => [dataset.layer, dataset.value].map(Number))"
    )
    return [value for _, value in sorted(bars)]


def sums(page: Page) -> list[float]:
    return [sum(layer) for layer in shown_cells(page)]


def rounded(values: list[float]) -> object:
    """As exact as the server rounds."""
    return pytest.approx(values, abs=0.0006)


def test_it_changes_while_requests_run(pages: Pages, server: Server) -> None:
    generate(server)
    page = pages.open(server.url).page
    eventually(page, lambda: sums(page), EVEN)
    with busy(server):
        expect(page.locator('[data-figure="running"]')).to_have_text("2")
        seen = [shown_cells(page)]
        for _ in range(2):
            eventually(page, lambda: shown_cells(page) == seen[-1], False)
            seen.append(shown_cells(page))
            assert sums(page) == EVEN
    expect(page.locator('[data-figure="running"]')).to_have_text("0")


def test_the_values_are_those_of_the_api(pages: Pages, server: Server) -> None:
    httpx.post(f"{server.url}/v1/experts/reset")
    generate(server, max_tokens=600)  # more than the window
    found = report(server)
    assert found["window"]["steps"] < found["total"]["steps"]
    page = pages.open(server.url).page
    for span in ("window", "total"):
        page.locator("#heatmap-span").select_option(span)
        layers = found[span]["layers"]
        shares = [rounded([count / sum(layer["assigned"]) for count in layer["assigned"]]) for layer in layers]
        eventually(page, lambda: shown_cells(page), shares)
        for bars, name in (
            ("entropy", "entropy_share"),
            ("imbalance", "max_over_mean"),
            ("distinct", "distinct_experts"),
        ):
            assert shown_bars(page, bars) == rounded([layer[name] for layer in layers])
    page.locator("#heatmap-metric").select_option("entropy")
    entropy = [rounded([layer["entropy_share"]] * EXPERTS) for layer in found["total"]["layers"]]
    eventually(page, lambda: shown_cells(page), entropy)
    page.locator("#heatmap-metric").select_option("drops")
    nothing = [[0.0] * EXPERTS] * LAYERS
    eventually(page, lambda: shown_cells(page), nothing)


def test_drops(pages: Pages, tokenizer: Tokenizer, servers: ExitStack) -> None:
    """The fake engine's layer n drops n + 1 choices of its first expert."""
    live = servers.enter_context(live_server(lambda: FakeEngine(lambda _: [5, 6]), tokenizer))
    live.complete()
    page = pages.open(live.url).page
    page.locator("#heatmap-metric").select_option("drops")
    for layer in range(2):
        for expert in range(EXPERTS):
            cell = page.locator(f'#heatmap [data-layer="{layer}"][data-expert="{expert}"]')
            expect(cell).to_have_attribute("data-value", str((layer + 1) * (expert == 0)))


@pytest.mark.parametrize("touch", [False, True], ids=["hover", "tap"])
def test_a_cell_tells_its_value(pages: Pages, server: Server, touch: bool) -> None:
    generate(server)
    page = pages.open(server.url, has_touch=touch).page
    eventually(page, lambda: sums(page), EVEN)
    values = page.locator("#heatmap-values")
    for layer, expert in ((0, 0), (2, 7), (1, 3)):
        cell = page.locator(f'#heatmap [data-layer="{layer}"][data-expert="{expert}"]')
        cell.tap() if touch else cell.hover()
        expect(values).to_contain_text(f"{100 * float(cell.get_attribute('data-value') or 'nan'):.1f}")
        expect(cell).to_have_accessible_name(values.text_content() or "nothing")


def test_the_what_if_slider(pages: Pages, server: Server) -> None:
    httpx.post(f"{server.url}/v1/experts/reset")
    generate(server, prompt=list(range(100, 164)), max_tokens=20)
    page = pages.open(server.url).page
    page.locator("#heatmap-metric").select_option("whatif")
    slider = page.get_by_label("Capacity factor")
    overflow = []
    for factor in ("0.5", "1", "1.5"):
        slider.fill(factor)
        found = httpx.get(f"{server.url}/v1/experts/what_if", params={"capacity_factor": factor}).json()
        for span in ("window", "total"):
            number = page.locator(f"#capacity-{span}")
            expect(number).to_contain_text(f"{100 * found[span]['overflow_share']:.2f} %")
            expect(number).to_have_attribute("data-overflow", str(found[span]["overflow"]))
        expect(page.locator("#capacity-number")).to_contain_text(factor)
        eventually(page, lambda: shown_cells(page), found["window"]["by_expert"])
        overflow.append(found["window"]["overflow"])
    assert overflow[0] > overflow[1] > 0


def test_the_reset_button(pages: Pages, server: Server) -> None:
    generate(server)
    page = pages.open(server.url).page
    page.locator("#heatmap-span").select_option("total")
    eventually(page, lambda: sums(page), EVEN)
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Reset").click()
    nothing = [0.0] * LAYERS
    eventually(page, lambda: sums(page), nothing)
    assert report(server)["total"]["tokens"] == 0


def test_figures_of_the_engine(pages: Pages, server: Server) -> None:
    page = pages.open(server.url).page
    with busy(server):
        for name in ("generation", "running", "waiting", "kv", "prefix", "ttft_p50", "ttft_p99", "itl_p50", "itl_p99"):
            expect(page.locator(f'[data-figure="{name}"]')).to_have_text(A_NUMBER)
        expect(page.locator('#memory [data-kind="expert"]')).to_have_text(A_NUMBER)
        for name in ("imbalance", "entropy", "tokens"):
            expect(page.locator(f"#chart-{name} canvas")).to_be_visible()
    expect(page.locator('[data-figure="generation"]')).to_have_attribute("data-value", "0")
