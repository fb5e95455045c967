"""Requests with a grammar in the engine: what they say, and that nobody else notices."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from engine.core import EngineCore
from engine.grammar import GrammarError, GrammarSpec, Matcher, store
from engine.grammar.build import build
from engine.grammar.matcher import TokenBits
from engine.grammar.store import GrammarStore
from engine.types import FinishReason, Request, SamplingParams, TokenEvent
from tests.engine.cores import make_core, run
from tests.engine.grammar.texts import ENDS, byte_vocabulary
from tests.random_schemas import random_schema
from tests.tiny import write_tiny_mixtral
from tests.tiny_tokenizer import VOCAB_SIZE

STOP, LENGTH, ERROR = FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR
PROMPT = tuple(b"Say something: ")
REGEX = r"[a-z]{3,8}-[0-9]{2,4}(; [A-Z]+é?)*"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config knows one of the vocabulary's two ends."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_mixtral(folder, vocab_size=VOCAB_SIZE, max_position_embeddings=8192, eos_token_ids=(ENDS[0],), seed=5)
    return folder


@pytest.fixture
def core(checkpoint: Path) -> EngineCore:
    return with_vocabulary(make_core(checkpoint))


def with_vocabulary(core: EngineCore) -> EngineCore:
    core.use_vocabulary(byte_vocabulary())
    return core


def ask(request_id: str, spec: GrammarSpec | None, **params: Any) -> Request:
    """At temperature 1, with up to 100 tokens."""
    return Request(
        request_id=request_id,
        prompt_ids=PROMPT,
        params=SamplingParams(**{"max_tokens": 100, "seed": 0} | params),
        grammar=None if spec is None else spec.source(),
    )


def tokens_of(events: list[TokenEvent]) -> list[int]:
    return [token_id for event in events for token_id in event.token_ids]


def text_of(events: list[TokenEvent]) -> str:
    """Without the token that ended it."""
    tokens = tokens_of(events)
    if tokens and tokens[-1] in ENDS:
        tokens.pop()
    return bytes(tokens).decode(errors="replace")


def end_of(events: list[TokenEvent]) -> FinishReason | None:
    assert all(event.finish_reason is None for event in events[:-1])
    return events[-1].finish_reason


def blocks_are_free(core: EngineCore) -> bool:
    stats = core.stats()
    return stats.num_free_blocks == stats.num_blocks and (stats.num_running, stats.num_waiting) == (0, 0)


def test_answers_match_their_grammars(core: EngineCore) -> None:
    requests = {
        f"{kind} {seed}": (spec, seed)
        for seed in range(6)
        for kind, spec in {
            "regex": GrammarSpec.regex(REGEX),
            "choice": GrammarSpec.choice(["ja", "nein", "ja und nein", "日本"]),
            "lark": GrammarSpec.lark('start: "(" start ")" | /[0-9]{1,3}/'),
        }.items()
    }
    events = run(core, *(ask(name, spec, seed=seed) for name, (spec, seed) in requests.items()))
    texts: dict[str, set[str]] = {}
    for name, found in events.items():
        assert end_of(found) is STOP, name
        texts.setdefault(name.split()[0], set()).add(text_of(found))
    assert all(re.fullmatch(REGEX, text) for text in texts["regex"])
    assert len(texts["regex"]) == 6
    assert texts["choice"] <= {"ja", "nein", "ja und nein", "日本"}
    assert len(texts["choice"]) > 1
    assert all(re.fullmatch(r"\(*[0-9]{1,3}\)*", text) and text.count("(") == text.count(")") for text in texts["lark"])
    assert blocks_are_free(core)


def test_answers_are_valid_under_their_schemas(core: EngineCore) -> None:
    schemas = {f"r{seed}": random_schema(seed) for seed in range(40)}
    requests = [
        ask(name, GrammarSpec.json_schema(schema.schema), seed=number, max_tokens=1500)
        for number, (name, schema) in enumerate(schemas.items())
    ]
    events = run(core, *requests)
    ends = {name: end_of(found) for name, found in events.items()}
    assert {*ends.values()} <= {STOP, LENGTH}
    assert all(ends[name] is STOP for name, schema in schemas.items() if schema.bounded)
    assert list(ends.values()).count(STOP) >= 35
    for name, end in ends.items():
        if end is STOP:
            Draft202012Validator(schemas[name].schema).validate(json.loads(text_of(events[name])))


def plain(count: int) -> list[Request]:
    """Without a grammar: greedy and not."""
    return [ask(f"plain {i}", None, seed=i, temperature=i % 2, ignore_eos=True, max_tokens=30) for i in range(count)]


def test_those_beside_say_what_they_say_alone(core: EngineCore) -> None:
    alone = run(core, *plain(6))
    constrained = [ask(f"c{i}", GrammarSpec.regex(REGEX), seed=i, logit_bias=((65, 100.0),)) for i in range(5)]
    mixed = [request for pair in zip(plain(6), [*constrained, None], strict=True) for request in pair if request]
    together = run(core, *mixed)
    assert {name: tokens_of(events) for name, events in alone.items()} == {
        name: tokens_of(events) for name, events in together.items() if name in alone
    }
    assert all(re.fullmatch(REGEX, text_of(events)) for name, events in together.items() if name not in alone)


def test_a_preempted_sequence_goes_on_where_it_was(checkpoint: Path) -> None:
    spec = GrammarSpec.regex(r"([a-z]{2,5}[0-9]{1,2}, ){4,7}end")
    requests = [ask(f"r{i}", spec, seed=i) for i in range(8)]
    roomy = run(with_vocabulary(make_core(checkpoint)), *requests)
    core = with_vocabulary(make_core(checkpoint, num_blocks=30, max_num_batched_tokens=16))
    crowded = run(core, *requests)
    assert core.stats().num_preemptions > 3
    assert {name: tokens_of(events) for name, events in crowded.items()} == {
        name: tokens_of(events) for name, events in roomy.items()
    }
    assert all(re.fullmatch(r"([a-z]{2,5}[0-9]{1,2}, ){4,7}end", text_of(events)) for events in crowded.values())
    assert blocks_are_free(core)


def test_choices_follow_the_grammar_each_for_itself(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One seed and one grammar, which is built once."""
    sources: list[str] = []

    def counted(source: str, tokenizer: Any) -> Matcher:
        sources.append(source)
        return build(source, tokenizer)

    monkeypatch.setattr(store, "build", counted)
    events = run(core, *(ask(f"r{i}", GrammarSpec.regex(REGEX), seed=7, choice=i) for i in range(8)))
    texts = {text_of(found) for found in events.values()}
    assert len(texts) == 8
    assert all(re.fullmatch(REGEX, text) for text in texts)
    assert len(sources) == 1


def test_ignore_eos_does_not_go_beyond_the_grammar(core: EngineCore) -> None:
    for seed in range(3):
        (events,) = run(core, ask("r", GrammarSpec.choice(["ab"]), seed=seed, ignore_eos=True)).values()
        assert (text_of(events), end_of(events), len(tokens_of(events))) == ("ab", STOP, 3)


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("end", ENDS)
def test_min_tokens(core: EngineCore, ignore_eos: bool, end: int) -> None:
    """Even if the model would rather end, by either end; with ignore_eos there is no end but the grammar's or
    max_tokens."""
    bias = ((end, 100.0),)
    for min_tokens in (0, 1, 5, 20):
        params = {"min_tokens": min_tokens, "ignore_eos": ignore_eos, "logit_bias": bias, "max_tokens": 30}
        events = run(core, ask("a", GrammarSpec.regex("a*"), **params), ask("b", GrammarSpec.choice(["ab"]), **params))
        assert tokens_of(events["a"]) == ([*b"a" * 30] if ignore_eos else [*b"a" * min_tokens, end])
        assert end_of(events["a"]) is (LENGTH if ignore_eos else STOP)
        assert tokens_of(events["b"]) == [*b"ab", end], "no more can come"
        assert end_of(events["b"]) is STOP


def test_an_end_that_the_model_does_not_know_of(core: EngineCore) -> None:
    """The vocabulary has one more than config.json."""
    assert ENDS[1] not in core.info.eos_token_ids
    (events,) = run(core, ask("r", GrammarSpec.regex("a+"), logit_bias=((ENDS[1], 100.0),))).values()
    assert tokens_of(events) == [ord("a"), ENDS[1]]
    assert (end_of(events), events[-1].stop_reason) == (STOP, None)


def test_stop_ids(core: EngineCore) -> None:
    b, z = ord("b"), ord("z")
    bias = ((b, 100.0), (z, 100.0))
    (events,) = run(core, ask("r", GrammarSpec.regex("aa[ab]{50}"), stop_token_ids=(b, z), logit_bias=bias)).values()
    assert (tokens_of(events), end_of(events), events[-1].stop_reason) == ([*b"aab"], STOP, b)
    later = ask("r", GrammarSpec.regex("aa[ab]{50}"), stop_token_ids=(b, z), logit_bias=bias, min_tokens=10)
    (events,) = run(core, later).values()
    assert tokens_of(events) == [*b"aaaaaaaaaab"]
    (events,) = run(core, ask("r", GrammarSpec.choice(["bbb"]), stop_token_ids=(b,), min_tokens=2)).values()
    assert tokens_of(events) == [b], "nothing else may follow"


def test_the_limit_comes_first(core: EngineCore) -> None:
    (events,) = run(core, ask("r", GrammarSpec.regex("[a-z]{10}"), max_tokens=7)).values()
    assert end_of(events) is LENGTH
    assert re.fullmatch("[a-z]{7}", text_of(events))
    (events,) = run(core, ask("r", GrammarSpec.regex("[a-z]{10}"), max_tokens=11)).values()
    assert end_of(events) is STOP, "the end exactly at the limit"


def test_logprobs_are_of_the_model(core: EngineCore) -> None:
    spec = GrammarSpec.choice(["zz"])
    events = run(core, ask("grammar", spec, logprobs=5), ask("plain", None, logprobs=5, max_tokens=1))
    (first,) = events["grammar"][0].logprobs or ()
    (free,) = events["plain"][0].logprobs or ()
    assert [token_id for token_id, _ in first.top] == [token_id for token_id, _ in free.top]
    assert [value for _, value in first.top] == pytest.approx([value for _, value in free.top], abs=1e-4)
    assert (first.token_id, first.rank > 1, first.logprob < -0.1) == (ord("z"), True, True)


def test_a_bias_does_not_break_a_grammar(core: EngineCore) -> None:
    bias = ((ord("x"), 100.0), (ord("c"), 50.0), (258, 100.0), (ENDS[0], 100.0))
    (events,) = run(core, ask("r", GrammarSpec.regex("[abc]{4}"), logit_bias=bias)).values()
    assert text_of(events) == "cccc"
    forbidden = tuple((token_id, -100.0) for token_id in b"abc")
    (events,) = run(core, ask("r", GrammarSpec.regex("[abc]{4}"), logit_bias=forbidden)).values()
    assert re.fullmatch("[abc]{4}", text_of(events))


def test_greedy_takes_the_likeliest_that_is_allowed(core: EngineCore) -> None:
    tops = run(core, ask("free", None, temperature=0.0, max_tokens=1, logprobs=20))["free"][0].logprobs
    assert tops is not None
    third = tops[0].top[2][0]
    fourth = tops[0].top[3][0]
    (events,) = run(core, ask("r", GrammarSpec.lark(f"start: <[{third}]> | <[{fourth}]>"), temperature=0.0)).values()
    assert tokens_of(events)[0] == third


def test_a_scored_prompt(core: EngineCore) -> None:
    """Nothing is generated, so nothing is followed."""
    (events,) = run(core, ask("r", GrammarSpec.choice(["ab"]), max_tokens=0, prompt_logprobs=0)).values()
    assert (tokens_of(events), end_of(events)) == ([], LENGTH)
    assert len(events[0].prompt_logprobs or ()) == len(PROMPT) - 1


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """No grammar is built before this is set."""
    go_on = threading.Event()

    def slow(source: str, tokenizer: Any) -> Matcher:
        assert go_on.wait(30)
        return build(source, tokenizer)

    monkeypatch.setattr(store, "build", slow)
    yield go_on
    go_on.set()


def test_others_go_on_while_a_grammar_is_built(core: EngineCore, built: threading.Event) -> None:
    core.add(ask("waits", GrammarSpec.choice(["ab"])))
    core.add(ask("plain", None, max_tokens=20, ignore_eos=True))
    assert (core.stats().num_waiting, core.stats().num_running) == (2, 0)
    events: list[TokenEvent] = []
    while not any(event.finish_reason for event in events):
        events += core.step()
    assert {event.request_id for event in events} == {"plain"}
    assert (core.stats().num_waiting, core.stats().num_running, core.has_work) == (1, 0, True)
    begin = time.monotonic()
    assert [core.step() for _ in range(10)] == [[]] * 10
    assert time.monotonic() - begin > 0.03, "a step without work must not spin"
    built.set()
    assert text_of(run(core)["waits"]) == "ab"
    assert not core.has_work


def test_an_abort_while_the_grammar_is_built(core: EngineCore, built: threading.Event) -> None:
    for name in ("first", "second"):
        core.add(ask(name, GrammarSpec.choice(["ab"])))
    assert core.step() == []
    core.abort("first")
    assert core.stats().num_waiting == 1
    core.abort("second")
    assert (core.stats().num_waiting, core.has_work) == (0, False)
    core.add(ask("first", GrammarSpec.choice(["ab"])))
    built.set()
    events = run(core)
    assert {name: text_of(found) for name, found in events.items()} == {"first": "ab"}
    assert blocks_are_free(core)


def test_an_abort_in_the_middle(core: EngineCore) -> None:
    core.add(ask("gone", GrammarSpec.regex("[a-z]{90}")))
    core.add(ask("stays", GrammarSpec.regex("[a-z]{20}")))
    while core.stats().generation_tokens < 10:
        core.step()
    core.abort("gone")
    assert re.fullmatch("[a-z]{1,20}", text_of(run(core)["stays"]))
    assert blocks_are_free(core)


def test_a_grammar_that_is_refused_fails_its_request_alone(core: EngineCore) -> None:
    bad = Request(request_id="bad", prompt_ids=PROMPT, params=SamplingParams(), grammar='other: "a"')
    events = run(core, bad, ask("good", GrammarSpec.choice(["ab"])), *plain(1))
    assert end_of(events["bad"]) is ERROR
    assert events["bad"][0].error == "the grammar was refused: no start rule found"
    assert text_of(events["good"]) == "ab"
    assert end_of(events["plain 0"]) is LENGTH
    assert not core.has_work
    assert blocks_are_free(core)
    core.add(bad)  # the id is free again
    assert end_of(run(core)["bad"]) is ERROR


class Failing(Matcher):
    """Allows everything for a while; then `where` raises."""

    def __init__(self, where: str, after: int) -> None:
        self._where, self._left = where, after
        self.end_ids = ENDS

    def copy(self) -> Matcher:
        return self

    def fill(self, bits: TokenBits) -> None:
        bits[:] = 0
        bits[:16] = 0xFF
        self._count("fill")

    def consume(self, token_id: int) -> None:
        assert token_id < 128
        self._count("consume")

    def _count(self, where: str) -> None:
        if where == self._where:
            self._left -= 1
            if self._left < 0:
                raise GrammarError(f"injected in {where}")


@pytest.mark.parametrize("where", ["fill", "consume"])
@pytest.mark.parametrize("after", [0, 5])
def test_a_matcher_that_fails_fails_its_request_alone(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch, where: str, after: int
) -> None:
    """F3."""
    alone = run(core, *plain(4), ask("good", GrammarSpec.regex(REGEX)))
    get: Callable[[GrammarStore, str], Future[Matcher]] = GrammarStore.get

    def injected(self: GrammarStore, source: str) -> Future[Matcher]:
        if "bad" not in source:
            return get(self, source)
        future: Future[Matcher] = Future()
        future.set_result(Failing(where, after))
        return future

    monkeypatch.setattr(GrammarStore, "get", injected)
    events = run(
        core, *plain(2), ask("bad", GrammarSpec.choice(["bad"])), *plain(4)[2:], ask("good", GrammarSpec.regex(REGEX))
    )
    bad = events.pop("bad")
    assert (end_of(bad), bad[-1].error, len(tokens_of(bad))) == (ERROR, f"injected in {where}", after)
    assert bad[-1].param == "grammar"
    assert {name: tokens_of(found) for name, found in events.items()} == {
        name: tokens_of(found) for name, found in alone.items()
    }
    assert not core.has_work
    assert blocks_are_free(core)


def test_a_grammar_that_takes_ever_longer_is_given_up(core: EngineCore) -> None:
    """The others wait for its tokens only so long."""
    ambiguous = GrammarSpec.lark('start: s\ns: s s | s s s | "a" | "b" | "ab"')
    bias = tuple((end, -100.0) for end in ENDS)
    events = run(core, ask("bad", ambiguous, max_tokens=1000, logit_bias=bias), *plain(1))
    assert end_of(events["bad"]) is ERROR
    assert events["bad"][-1].error == "the grammar takes too long to follow; make it simpler"
    assert end_of(events["plain 0"]) is LENGTH
