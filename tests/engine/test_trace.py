"""Traces: every entry is of the token that it stands for, through chunks, batches, preemption and the prefix cache.

The checkpoint is made by hand, so that a token id tells its routing; tokens are drawn at random, so that no entry can
be right by being shifted.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from engine.core import EngineCore
from engine.types import Request, SamplingParams, Steering, TokenEvent, TokenRouting
from tests.engine.cores import make_core, run
from tests.engine.routing.handmade import EXPERTS, LAYERS, VOCAB, routing_of, write_handmade


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handmade")
    write_handmade(folder, random_tokens=True)
    return folder


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int,
    *,
    output: bool = True,
    prompt_too: bool = True,
    steering: Steering | None = None,
) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=len(prompt) * 100 + max_tokens)
    return Request(
        request_id=request_id,
        prompt_ids=tuple(prompt),
        params=params,
        steering=steering,
        trace_routing=output,
        trace_prompt_routing=prompt_too,
    )


def check_entry(actual: TokenRouting, expected: TokenRouting) -> None:
    assert actual.expert_ids == expected.expert_ids
    assert actual.entropy == pytest.approx(expected.entropy, rel=1e-5)
    for layer, weights in enumerate(actual.weights):
        assert weights == pytest.approx(expected.weights[layer], rel=1e-5)
        assert sum(weights) == pytest.approx(1, abs=1e-6)


def check(request: Request, events: list[TokenEvent]) -> None:
    """Prompt entries once, with the first token; with each token one entry, of the token before it."""
    tokens = list(request.prompt_ids)
    for number, event in enumerate(events):
        assert (event.routing is not None) == request.trace_routing
        if event.routing is not None:
            assert len(event.routing) == len(event.token_ids) == 1
            check_entry(event.routing[0], routing_of(tokens[-1], request.steering))
        tokens += event.token_ids
        if number > 0 or not request.trace_prompt_routing:
            assert event.prompt_routing is None
            continue
        assert event.prompt_routing is not None
        assert len(event.prompt_routing) == len(request.prompt_ids)
        for entry, token in zip(event.prompt_routing, request.prompt_ids, strict=True):
            check_entry(entry, routing_of(token, request.steering))
        assert event.num_cached_tokens == 0
    assert len(tokens) == len(request.prompt_ids) + (request.params.max_tokens or 0)


def ids(seed: int, count: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(count)]


@pytest.mark.parametrize("budget", [2048, 7, 1])
@pytest.mark.parametrize(("output", "prompt_too"), [(True, True), (True, False), (False, True), (False, False)])
def test_one_request(checkpoint: Path, budget: int, output: bool, prompt_too: bool) -> None:
    core = make_core(checkpoint, record_routing=True, max_num_batched_tokens=budget)
    request = make_request("a", ids(1, 23), 9, output=output, prompt_too=prompt_too)
    events = run(core, request)["a"]
    check(request, events)
    assert len({token for event in events for token in event.token_ids}) > 3


STEERINGS = [
    None,
    None,
    Steering(experts_per_token=1),
    Steering(experts_per_token=EXPERTS),
    Steering(forbidden=((0, (0, 1)), (1, (3,))), experts_per_token=3),
    Steering(min_p=0.5),
]


def crowd(rng: random.Random, count: int) -> list[Request]:
    """All kinds of traces and steering; a third begin alike, so that the cache serves those that leave the prompt
    out."""
    shared = [rng.randrange(VOCAB) for _ in range(9)]
    requests = []
    for index in range(count):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 3, 8, 17, 30]))]
        requests.append(
            make_request(
                f"r{index}",
                shared + prompt if index % 3 == 0 else prompt,
                rng.randint(1, 20),
                output=rng.random() < 0.8,
                prompt_too=rng.random() < 0.5,
                steering=STEERINGS[index % 2] if index % 3 == 0 else rng.choice(STEERINGS),
            )
        )
    return requests


@pytest.mark.parametrize("seed", range(3))
def test_a_crowd_with_little_room(checkpoint: Path, seed: int) -> None:
    core = make_core(checkpoint, record_routing=True, num_blocks=25, max_num_batched_tokens=11, max_num_seqs=7)
    requests = crowd(random.Random(seed), 40)
    events = run(core, *requests)
    for request in requests:
        check(request, events[request.request_id])
    stats = core.stats()
    assert stats.num_preemptions > 5
    assert stats.recomputed_tokens > 50
    assert stats.prefix_cache_hits > 0


def test_a_prompt_that_is_preempted_while_it_is_computed_is_traced_once(checkpoint: Path) -> None:
    core = make_core(
        checkpoint, record_routing=True, num_blocks=12, max_num_batched_tokens=8, enable_prefix_caching=False
    )
    requests = [make_request(name, ids(index, 2), 40) for index, name in enumerate("ab")]
    requests.append(make_request("late", ids(5, 33), 3))
    events = run(core, *requests)
    assert core.stats().num_preemptions > 0
    for request in requests:
        check(request, events[request.request_id])


def test_a_traced_prompt_reads_no_cache_and_fills_it(checkpoint: Path) -> None:
    core = make_core(checkpoint, record_routing=True)
    prompt = ids(2, 21)
    for name in "ab":
        request = make_request(name, prompt, 2)
        check(request, run(core, request)[name])
    plain = make_request("c", prompt, 2, prompt_too=False)
    events = run(core, plain)["c"]
    check(plain, events)
    assert events[0].num_cached_tokens == 20, "what the output's trace needs is computed anyway"


def test_a_prompt_that_is_only_scored_has_a_trace_too(checkpoint: Path) -> None:
    core = make_core(checkpoint, record_routing=True, max_num_batched_tokens=4)
    request = make_request("a", ids(3, 10), 1)
    request = replace(request, params=replace(request.params, max_tokens=0, prompt_logprobs=0))
    (event,) = run(core, request)["a"]
    assert (event.token_ids, event.routing) == ((), None)
    assert event.prompt_logprobs is not None
    assert len(event.prompt_logprobs) == 9
    assert event.prompt_routing is not None
    for entry, token in zip(event.prompt_routing, request.prompt_ids, strict=True):
        check_entry(entry, routing_of(token))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_shapes(checkpoint: Path, backend: str) -> None:
    core: EngineCore = make_core(checkpoint, record_routing=True, backend=backend)
    request = make_request("a", [3, 20], 1, steering=Steering(experts_per_token=3))
    (event,) = run(core, request)["a"]
    assert event.prompt_routing is not None
    assert event.routing is not None
    for entry in (*event.prompt_routing, *event.routing):
        assert len(entry.expert_ids) == len(entry.weights) == len(entry.entropy) == LAYERS
        assert [len(row) for row in entry.expert_ids] == [len(row) for row in entry.weights] == [3, 3]
        assert all(type(value) is int for row in entry.expert_ids for value in row)
        assert all(type(value) is float for row in entry.weights for value in row)
    assert event.routing == event.prompt_routing[-1:], "the pass that produced the token is the last prompt token's"
