"""Answers stream, and tokens have the colours and traces that the API gives."""

from __future__ import annotations

from contextlib import ExitStack
from itertools import pairwise

from playwright.sync_api import expect

from engine.text import Tokenizer
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
from tests.server.fake_engine import FakeEngine
from tests.server.harness import live_server

TEXT = "The lighthouse keeper wrote everything down: the wind, the ships, 1,482 naïve pages — and a café. 😀"


def test_an_answer_streams(pages: Pages, tokenizer: Tokenizer, servers: ExitStack) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    live = servers.enter_context(live_server(lambda: FakeEngine(lambda _: ids, step_seconds=0.05), tokenizer))
    page = pages.open(live.url).page
    put_controls(page, max_tokens=100)
    send(page, "Tell me")
    answer = last_answer(page, "plain")
    expect(answer).to_have_attribute("data-state", "running")
    lengths = []
    while answer.get_attribute("data-state") == "running":
        lengths.append(len(text_of(answer)))
        page.wait_for_timeout(100)
    wait_done(answer)
    assert text_of(answer) == f" {TEXT}"
    steps = [length for length, after in pairwise(lengths) if after > length]
    assert len(steps) > 5, "it grew before everybody's eyes"
    expect(answer.locator("[data-token]")).to_have_count(len(ids))


def test_stop(pages: Pages, tokenizer: Tokenizer, servers: ExitStack) -> None:
    live = servers.enter_context(live_server(lambda: FakeEngine(lambda _: [5] * 10_000, step_seconds=0.02), tokenizer))
    page = pages.open(live.url).page
    put_controls(page, max_tokens=200)
    send(page, "Tell me")
    answer = last_answer(page, "plain")
    expect(answer.locator("[data-token]").nth(5)).to_be_attached()
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(answer).to_have_attribute("data-state", "stopped")
    page.wait_for_timeout(300)
    assert len(live.call(lambda: list(live.engine.aborted))) == 1


def test_the_conversation_goes_on_and_begins_anew(pages: Pages, tokenizer: Tokenizer, servers: ExitStack) -> None:
    ids = tokenizer.encode("Yes.", add_special_tokens=False)
    live = servers.enter_context(live_server(lambda: FakeEngine(lambda _: ids), tokenizer))
    watched = pages.open(live.url)
    page = watched.page
    put_controls(page)
    for question in ("One?", "Two?"):
        send(page, question)
        wait_done(last_answer(page, "plain"))
        expect(page.get_by_label("Message", exact=True)).to_have_value("")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator("[data-answer]")).to_have_count(0)
    send(page, "Three?")
    wait_done(last_answer(page, "plain"))
    messages = [
        [(message["role"], message["content"]) for message in body["messages"]]
        for body in watched.posted("/v1/chat/completions")
    ]
    assert messages == [
        [("user", "One?")],
        [("user", "One?"), ("assistant", " Yes."), ("user", "Two?")],
        [("user", "Three?")],
    ]


def test_colours_and_traces_are_those_of_the_api(pages: Pages, server: Server) -> None:
    """The tiny model answers with bytes, many of them no whole character."""
    watched = pages.open(server.url)
    page = watched.page
    put_controls(page, max_tokens=48)
    send(page, "Which experts?")
    answer = wait_done(last_answer(page, "plain"))
    (posted,) = watched.posted("/v1/chat/completions")
    (choice,) = ask_api(server.url, posted)["choices"]
    trace = choice["routing"]["tokens"]
    assert len(trace) > 20, "the model did not end at once"
    assert text_of(answer) == choice["message"]["content"]
    count = len(choice["logprobs"]["content"])
    for layer in (0, 2, 1):
        choose_layer(page, layer)
        strongest = [token["experts"][layer][0] for token in trace[:count]]
        eventually(page, lambda: strongest_experts(answer), strongest)
    colours = answer.locator("[data-token]").evaluate_all(
        "tokens => tokens.map(token => [token.dataset.expert, getComputedStyle(token).backgroundColor])"
    )
    by_expert = dict(colours)
    assert len(by_expert) > 3
    assert len(set(by_expert.values())) == len(by_expert), "every expert has a colour of its own"
    assert all(by_expert[expert] == colour for expert, colour in colours), "and keeps it"
    for index in (0, 7, count - 1):
        token = answer.locator(f'[data-token="{index}"]')
        token.evaluate("token => token.click()")  # a byte within a character has no area of its own
        eventually(page, lambda: shown_trace(page), trace_rows(trace[index]))
