"""The chat of the page, and the same question put to the API."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import httpx
from playwright.sync_api import Locator, Page, expect

TRACE_JS = """trace => [...trace.querySelectorAll("[data-layer]")].map(row => ({
    layer: Number(row.dataset.layer),
    experts: [...row.querySelectorAll("[data-expert]")].map(item => Number(item.dataset.expert)),
    weights: [...row.querySelectorAll("[data-weight]")].map(item => Number(item.dataset.weight)),
    entropy: Number((row.matches("[data-entropy]") ? row : row.querySelector("[data-entropy]")).dataset.entropy),
}))"""
"""Of the page's panel about one token."""


def put_controls(page: Page, *, temperature: float = 0, max_tokens: int = 40) -> None:
    """When the page knows its model: that fills them in first."""
    expect(page.locator("#send")).to_be_enabled()
    page.locator("#temperature").fill(str(temperature))
    page.locator("#max-tokens").fill(str(max_tokens))


def send(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def last_answer(page: Page, kind: str) -> Locator:
    """The latest answer, `steered` or `plain`."""
    return page.locator(f'[data-answer="{kind}"]').last


def wait_done(answer: Locator) -> Locator:
    expect(answer).to_have_attribute("data-state", "done")
    return answer


def text_of(answer: Locator) -> str:
    return answer.get_by_role("listbox").text_content() or ""


def strongest_experts(answer: Locator) -> list[int]:
    """Of each token at the chosen layer."""
    found: list[int] = answer.locator("[data-token]").evaluate_all(
        "tokens => tokens.map(token => Number(token.dataset.expert))"
    )
    return found


def eventually(page: Page, check: Callable[[], object], expected: object, seconds: float = 10) -> None:
    """Until `check` returns what is expected."""
    deadline = time.monotonic() + seconds
    while (found := check()) != expected:
        assert time.monotonic() < deadline, f"{found} is not {expected}"
        page.wait_for_timeout(100)


def choose_layer(page: Page, layer: int) -> None:
    page.locator("#layer").fill(str(layer))


def shown_trace(page: Page) -> list[dict[str, Any]]:
    """By layer, in their order."""
    expect(page.locator("#trace")).to_be_visible()
    found: list[dict[str, Any]] = page.locator("#trace").evaluate(TRACE_JS)
    return found


def trace_rows(token: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page should show of a token of the API's trace."""
    parts = zip(token["experts"], token["weights"], token["entropy"], strict=True)
    return [
        {"layer": layer, "experts": experts, "weights": weights, "entropy": entropy}
        for layer, (experts, weights, entropy) in enumerate(parts)
    ]


def ask_api(url: str, posted: dict[str, Any]) -> dict[str, Any]:
    """The whole answer to what the page asked for in a stream, computed anew and not from the page's cached prompt."""
    body = {name: value for name, value in posted.items() if name not in ("stream", "stream_options")}
    body |= {"routing": True, "cache_salt": uuid4().hex}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
