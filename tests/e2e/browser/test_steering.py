"""Two answers side by side: what is asked for, what is shown, and that it is what the API says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.e2e.browser.asking import (
    ask_api,
    choose_layer,
    eventually,
    last_answer,
    put_controls,
    send,
    shown_trace,
    strongest_experts,
    text_of,
    trace_rows,
    wait_done,
)
from tests.e2e.browser.watched import Pages
from tests.e2e.running import Server


def forbid(page: Page, *experts: int) -> None:
    for expert in experts:
        button = page.locator(f'#forbidden button[data-expert="{expert}"]')
        button.click()
        expect(button).to_have_attribute("aria-pressed", "true")


def one_expert(page: Page) -> None:
    page.locator("#experts-per-token").select_option("1")


def forbid_in_last_layers(page: Page) -> None:
    forbid(page, 0, 3)
    page.locator("#forbidden-layers").fill("1-2")


def min_p(page: Page) -> None:
    page.locator("#min-p").fill("0.5")


def number(answer: Locator, name: str) -> float:
    return float(answer.locator(f"[{name}]").get_attribute(name) or "nan")


STEERINGS: dict[str, tuple[Callable[[Page], None], dict[str, Any]]] = {
    "one expert": (one_expert, {"experts_per_token": 1}),
    "forbidden": (lambda page: forbid(page, 1, 4, 6), {"expert_mask": [1, 4, 6]}),
    "forbidden in layers": (forbid_in_last_layers, {"expert_mask": {"1": [0, 3], "2": [0, 3]}}),
    "min-p": (min_p, {"expert_min_p": 0.5}),
}


@pytest.mark.parametrize("name", STEERINGS)
def test_side_by_side(pages: Pages, server: Server, name: str) -> None:
    steer, fields = STEERINGS[name]
    watched = pages.open(server.url)
    page = watched.page
    put_controls(page, max_tokens=48)
    page.get_by_label("Two answers side by side").check()
    steer(page)
    send(page, "Which experts?")
    answers = {kind: wait_done(last_answer(page, kind)) for kind in ("steered", "plain")}
    bodies = watched.posted("/v1/chat/completions")
    assert len(bodies) == 2
    steered_body = next(body for body in bodies if body.keys() & fields.keys())
    plain_body = next(body for body in bodies if body is not steered_body)
    assert {key: steered_body[key] for key in fields} == fields
    assert {key: value for key, value in steered_body.items() if key not in fields} == plain_body
    plain_params = _event_model(server)["active_params"]
    found = {kind: ask_api(server.url, body) for kind, body in (("steered", steered_body), ("plain", plain_body))}
    for kind, answer in answers.items():
        (choice,) = found[kind]["choices"]
        assert text_of(answer) == choice["message"]["content"]
        expected = found[kind]["usage"].get("active_params_per_token", plain_params)
        assert number(answer, "data-active-params") == pytest.approx(expected)
        assert number(answer, "data-tokens-per-second") > 0
        for layer in range(3):
            choose_layer(page, layer)
            count = answer.locator("[data-token]").count()
            strongest = [token["experts"][layer][0] for token in choice["routing"]["tokens"][:count]]
            eventually(page, partial(strongest_experts, answer), strongest)
    if "expert_mask" not in fields:
        assert number(answers["steered"], "data-active-params") < number(answers["plain"], "data-active-params")
    _check_traces(page, answers["steered"], found["steered"]["choices"][0]["routing"]["tokens"], fields)


def _check_traces(page: Page, answer: Locator, trace: list[dict[str, Any]], fields: dict[str, Any]) -> None:
    for index in range(0, answer.locator("[data-token]").count(), 6):
        answer.locator(f'[data-token="{index}"]').evaluate("token => token.click()")
        eventually(page, lambda: shown_trace(page), trace_rows(trace[index]))
        for layer, row in enumerate(shown_trace(page)):
            mask = fields.get("expert_mask", [])
            forbidden = mask.get(str(layer), []) if isinstance(mask, dict) else mask
            assert not set(row["experts"]) & set(forbidden)
            assert len(row["experts"]) <= fields.get("experts_per_token", 2)


def _event_model(server: Server) -> dict[str, Any]:
    """What an event says of the model."""
    with httpx.stream("GET", f"{server.url}/v1/experts/events", timeout=10) as response:
        line = next(line for line in response.iter_lines() if line.startswith("data: "))
    found: dict[str, Any] = json.loads(line.removeprefix("data: "))["model"]
    return found


@pytest.mark.parametrize(
    ("layers", "text"),
    [("", "at least one expert"), ("7-9", "layer"), ("two", "layer"), ("1,", "layer")],
)
def test_impossible_steering_is_said_plainly(pages: Pages, server: Server, layers: str, text: str) -> None:
    """Before anything is sent."""
    watched = pages.open(server.url)
    page = watched.page
    forbid(page, *range(1 if layers else 8))
    page.locator("#forbidden-layers").fill(layers)
    send(page, "Hello?")
    expect(page.locator("#steering-error")).to_contain_text(re.compile(text, re.IGNORECASE))
    expect(page.locator("[data-answer]")).to_have_count(0)
    assert watched.posted("/v1/chat/completions") == []
