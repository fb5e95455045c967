"""What is streamed is what is returned: text, tokens, log probabilities, offsets, finish and usage of random requests.

Each request is sent three times: without stop strings, which gives the text that stop strings are then taken from and
the answer that they must cut; then with them, whole and streamed.
"""

from __future__ import annotations

import json
import random
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.text import Tokenizer
from tests.e2e.random_requests import (
    CHAT,
    RandomRequest,
    Said,
    Target,
    cut,
    draw,
    draw_stops,
    read_chunks,
    read_whole,
    starts,
)
from tests.e2e.running import Server

BLOCK = 20
Seen = Counter[str]
"""How often the random requests came to what they are for."""


def target(folder: Path, model: str, max_tokens: int) -> Target:
    tokenizer = Tokenizer.load(folder)
    vocab_size = tokenizer.vocab_size
    special = frozenset(tokenizer.token_text(token) for token in range(vocab_size) if tokenizer.is_special(token))
    return Target(model, tokenizer.encode, tokenizer.decode, special, vocab_size, max_tokens)


def post(client: httpx.Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(path, json=body | options)
    assert response.status_code == 200, response.text
    *events, last, end = response.text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def check_request(client: httpx.Client, target: Target, seed: int) -> Seen:
    rng = random.Random(seed)
    request = draw(rng, target)
    path, body = request.path, request.body
    uncut = read_whole(path, post(client, path, body))
    echo = echo_length(request, target, uncut[0])
    stops = draw_stops(rng, [said.text[echo:] for said in uncut]) if rng.random() < 0.8 else []
    body |= {"stop": stops or None}
    answer = post(client, path, body)
    whole = read_whole(path, answer)
    chunks = stream(client, path, body)
    streamed = read_chunks(path, chunks, body["n"])
    for one, other in zip(whole, streamed, strict=True):
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason
        assert (one.tokens, one.data, one.offsets) == (other.tokens, other.data, other.offsets)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
    for usage in (answer["usage"], chunks[-1]["usage"]):
        usage.pop("prompt_tokens_details", None)
    assert answer["usage"] == chunks[-1]["usage"]
    seen = Seen(requests=1, choices=body["n"], echoes=echo > 0)
    num_prompt = answer["usage"]["prompt_tokens"] if request.echoed is not None else 0
    for said, free in zip(streamed, uncut, strict=True):
        check_cut(request, said, free, echo, stops)
        if said.tokens:
            check_tokens(request, target, said, echo, num_prompt)
            check_when_listed(request, target, said, echo, num_prompt)
        seen += Seen(
            cut=said.text != free.text,
            parts=sum(name.startswith("bytes:") for name in said.tokens),
            special=len(target.special.intersection(said.tokens)),
            multibyte=sum(ord(char) > 127 and char != "\ufffd" for char in said.text[echo:]),
            broken=said.text.count("\ufffd"),
        )
    return seen


def echo_length(request: RandomRequest, target: Target, said: Said) -> int:
    """Characters of the prompt in front of the choice's own text."""
    if request.echoed is None:
        return 0
    text = request.echoed if isinstance(request.echoed, str) else target.decode(request.echoed)
    assert said.text.startswith(text)
    return len(text)


def check_cut(request: RandomRequest, said: Said, free: Said, echo: int, stops: list[str]) -> None:
    """The text is what was said without stop strings, up to the first of them."""
    own, uncut = said.text[echo:], free.text[echo:]
    assert uncut.startswith(own)
    if own != uncut:
        assert said.finish_reason == "stop"
    else:
        assert said.finish_reason == free.finish_reason or stops
    # A stop string before min_tokens does not count, and the U+FFFD of a character that never ended is no part of one.
    if not request.body.get("min_tokens") and not any("\ufffd" in stop for stop in stops):
        assert own == cut(uncut, stops, include=request.body.get("include_stop_str_in_output", False))


def check_tokens(request: RandomRequest, target: Target, said: Said, echo: int, num_prompt: int) -> None:
    """Tokens concatenate to the text, and offsets say where each begins.

    What a stop string cut off within a token is still in that token, which then begins in the text. A token of which
    the cut left nothing is not listed.
    """
    prompt = texts(target, said, slice(num_prompt), skipped=not isinstance(request.echoed, str))
    own = texts(target, said, slice(num_prompt, None), skipped=request.skips_special)
    if prompt:
        assert b"".join(prompt).decode(errors="replace") == said.text[:echo]
    joined, text = b"".join(own).decode(errors="replace"), said.text[echo:]
    if (
        text.startswith(joined) and text != joined
    ):  # the end of sequence, which is listed nowhere, has a text if asked for
        assert request.body["include_stop_str_in_output"]
        assert not request.skips_special
        assert any(name.startswith(text[len(joined) :]) for name in target.special)
    elif joined != text:
        assert said.finish_reason == "stop"
        assert request.body["stop"]
        assert joined.startswith(text)
        assert starts(own)[-1] < len(text)
    if request.path == CHAT:
        return
    assert said.offsets == starts(prompt) + [echo + start for start in starts(own)]
    assert said.offsets == sorted(said.offsets)
    for name, data, offset in zip(said.tokens, prompt + own, said.offsets, strict=True):
        rest = said.text[offset:]
        if not name.startswith("bytes:") and data and offset < len(said.text) - len(name):
            # Where a character before was never completed, its U+FFFD comes with this token.
            assert rest.startswith(name) or rest.lstrip("\ufffd").startswith(name), (name, rest)


def texts(target: Target, said: Said, which: slice, *, skipped: bool) -> list[bytes]:
    """What each of the tokens has in the text; control tokens nothing, where they are skipped."""
    pairs = zip(said.tokens[which], said.data[which], strict=True)
    return [b"" if skipped and name in target.special else data for name, data in pairs]


def check_when_listed(request: RandomRequest, target: Target, said: Said, echo: int, num_prompt: int) -> None:
    """A token is listed in the chunk that brings the first of its text; with the last text, all that are left are."""
    own = starts(texts(target, said, slice(num_prompt, None), skipped=request.skips_special))
    for num_chars, num_tokens in said.pieces[:-2]:
        assert num_tokens == num_prompt + bisect_left(own, num_chars - echo)
    assert said.pieces[-1][1] == len(said.tokens)


@pytest.mark.parametrize("block", range(10))
def test_two_hundred_requests_to_the_tiny_model(tiny_server: Server, tiny_checkpoint: Path, block: int) -> None:
    """One after the other, so that nothing depends on what else is in a batch."""
    tiny = target(tiny_checkpoint, "tiny", max_tokens=40)
    seen = Seen()
    with httpx.Client(base_url=tiny_server.url, timeout=60) as client:
        for seed in range(block * BLOCK, (block + 1) * BLOCK):
            seen += check_request(client, tiny, seed)
    assert seen["cut"] >= 8, seen
    assert seen["parts"] >= 40, seen
    assert seen["multibyte"] >= 1, seen
    assert seen["broken"] >= 20, seen


@pytest.mark.demo
def test_real_tokens(demo_server: Server, demo_checkpoint: Path) -> None:
    """Whose bytes are parts of characters, and more than one character."""
    demo = target(demo_checkpoint, "mixserve-demo", max_tokens=10)
    with httpx.Client(base_url=demo_server.url, timeout=120) as client, ThreadPoolExecutor(8) as pool:
        seen = sum(pool.map(lambda seed: check_request(client, demo, seed), range(1000, 1020)), Seen())
    assert seen["cut"] >= 8, seen
    assert seen["parts"] >= 20, seen
    assert seen["multibyte"] >= 10, seen
