"""Token events to deltas: what is given out when, what is listed beside it, and what is counted."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from engine.errors import RequestFailedError
from engine.text import Tokenizer
from engine.types import FinishReason, SamplingParams, TokenEvent
from server.choices import Choice, ChoiceDelta, Echo
from tests.server.fake_engine import EOS, fake_logprob, score

PARTY = "日本 🦜🦜 naïve"


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def event(
    tokens: Sequence[int],
    *,
    finish: FinishReason | None = None,
    stop_reason: int | None = None,
    logprobs: bool = True,
    prompt: Sequence[int] | None = None,
    cached: int = 0,
    error: str | None = None,
) -> TokenEvent:
    return TokenEvent(
        request_id="r",
        token_ids=tuple(tokens),
        logprobs=tuple(score(token, 2) for token in tokens) if logprobs else None,
        prompt_logprobs=None if prompt is None else tuple(score(token, 2) for token in prompt[1:]),
        num_cached_tokens=cached,
        finish_reason=finish,
        stop_reason=stop_reason,
        error=error,
    )


def play(choice: Choice, events: Sequence[TokenEvent]) -> list[ChoiceDelta]:
    """The deltas of all events, up to the finish."""
    deltas: list[ChoiceDelta] = []
    for item in events:
        deltas += choice.push(item)
        if choice.finish_reason is not None:
            break
    return deltas


def events_of(tokens: Sequence[int], sizes: Sequence[int] | None = None, *, eos: bool = True) -> list[TokenEvent]:
    """`tokens`, then the end of sequence (or the token limit), in events of the given sizes (default: one each)."""
    tokens = [*tokens, EOS] if eos else [*tokens]
    sizes = sizes or [1] * len(tokens)
    last = FinishReason.STOP if eos else FinishReason.LENGTH
    events, start = [], 0
    for size in sizes:
        part = tokens[start : start + size]
        start += size
        if part:
            events.append(event(part, finish=last if start >= len(tokens) else None))
    assert start >= len(tokens)
    return events


def text_of(deltas: Sequence[ChoiceDelta]) -> str:
    return "".join(delta.text for delta in deltas)


def check_shape(deltas: Sequence[ChoiceDelta], index: int = 0) -> None:
    """No empty delta but the finish, which is the last and has no text."""
    assert all(delta.index == index for delta in deltas)
    assert all(delta.text and delta.finish_reason is None for delta in deltas[:-1])
    assert deltas[-1].finish_reason in ("stop", "length")
    assert deltas[-1].text == ""


def test_a_plain_answer(tokenizer: Tokenizer) -> None:
    tokens = encode(tokenizer, "Hello there")
    choice = Choice(3, tokenizer, SamplingParams(logprobs=2), chat=True)
    deltas = play(choice, events_of(tokens))
    check_shape(deltas, index=3)
    assert [delta.text for delta in deltas] == ["Hello", " there", ""]
    assert [[token.token_id for token in delta.tokens] for delta in deltas] == [[tokens[0]], [tokens[1]], []]
    assert choice.finish_reason == "stop"
    assert choice.num_tokens == 3, "the end of sequence counts"
    assert choice.mean_logprob == pytest.approx(sum(map(fake_logprob, [*tokens, EOS])) / 3)


def test_a_completion_keeps_its_leading_space_and_a_chat_does_not(tokenizer: Tokenizer) -> None:
    events = events_of(encode(tokenizer, "Hello"))
    assert text_of(play(Choice(0, tokenizer, SamplingParams(), chat=False), events)) == " Hello"
    assert text_of(play(Choice(0, tokenizer, SamplingParams(), chat=True), events)) == "Hello"


def test_without_logprobs_nothing_is_listed(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer, SamplingParams(), chat=True)
    deltas = choice.push(event(encode(tokenizer, "Hello"), logprobs=False, finish=FinishReason.LENGTH))
    assert [(delta.text, delta.tokens, delta.finish_reason) for delta in deltas] == [
        ("Hello", (), None),
        ("", (), "length"),
    ]
    assert choice.mean_logprob == 0


def test_a_character_split_over_tokens_is_sent_whole(tokenizer: Tokenizer) -> None:
    tokens = encode(tokenizer, PARTY)
    choice = Choice(0, tokenizer, SamplingParams(logprobs=0), chat=True)
    deltas = play(choice, events_of(tokens))
    check_shape(deltas)
    assert text_of(deltas) == PARTY
    assert "�" not in text_of(deltas[:3])
    listed = [token for delta in deltas for token in delta.tokens]
    assert [token.token_id for token in listed] == tokens
    party = PARTY.index("🦜")
    assert [token.offset for token in listed].count(party) == 4, "four byte tokens belong to the one character"


def test_a_character_that_is_never_finished(tokenizer: Tokenizer) -> None:
    tokens = encode(tokenizer, "🦜")[:-1]
    deltas = play(Choice(0, tokenizer, SamplingParams(logprobs=0), chat=True), events_of(tokens, eos=False))
    check_shape(deltas)
    assert text_of(deltas) == "�"
    assert [token.token_id for delta in deltas for token in delta.tokens] == tokens


@pytest.mark.parametrize(
    ("stop", "text", "num_listed"),
    [
        (" three", "one two", 2),
        ("three", "one two ", 3),  # the third token wrote the space before the cut
        ("two three", "one ", 2),
        ("ne", "o", 1),
        ("one", "", 0),
        ("four five", "one two three ", 4),
        ("absent", "one two three four five", 5),
    ],
)
@pytest.mark.parametrize("sizes", [None, [6], [2, 4], [3, 1, 2]])
def test_a_stop_string(tokenizer: Tokenizer, stop: str, text: str, num_listed: int, sizes: list[int] | None) -> None:
    tokens = encode(tokenizer, "one two three four five")
    assert len(tokens) == 5
    choice = Choice(0, tokenizer, SamplingParams(logprobs=1, stop=(stop,)), chat=True)
    deltas = play(choice, events_of(tokens, sizes))
    check_shape(deltas)
    assert text_of(deltas) == text
    assert choice.finish_reason == "stop"
    listed = [token.token_id for delta in deltas for token in delta.tokens]
    assert listed == tokens[:num_listed]
    assert choice.num_tokens == (num_listed if stop != "absent" else 6)


def test_held_text_is_flushed_at_the_end_with_its_tokens(tokenizer: Tokenizer) -> None:
    tokens = encode(tokenizer, "one two")
    choice = Choice(0, tokenizer, SamplingParams(logprobs=0, stop=("one two three",)), chat=True)
    deltas = play(choice, events_of(tokens))
    assert [delta.text for delta in deltas] == ["one two", ""]
    assert [len(delta.tokens) for delta in deltas] == [2, 0]


def test_the_stop_string_in_the_output(tokenizer: Tokenizer) -> None:
    tokens = encode(tokenizer, "one two three")
    params = SamplingParams(logprobs=0, stop=("two",), include_stop_str_in_output=True)
    deltas = play(Choice(0, tokenizer, params, chat=True), events_of(tokens))
    assert text_of(deltas) == "one two"
    assert [token.token_id for delta in deltas for token in delta.tokens] == tokens[:2]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_id(tokenizer: Tokenizer, include: bool) -> None:
    one, two = encode(tokenizer, "one two")
    params = SamplingParams(logprobs=0, stop_token_ids=(two,), include_stop_str_in_output=include)
    choice = Choice(0, tokenizer, params, chat=True)
    deltas = play(choice, [event([one]), event([two], finish=FinishReason.STOP, stop_reason=two)])
    assert text_of(deltas) == ("one two" if include else "one")
    assert [token.token_id for delta in deltas for token in delta.tokens] == ([one, two] if include else [one])
    assert choice.num_tokens == 2


@pytest.mark.parametrize("skip", [False, True])
def test_an_end_of_sequence_is_never_listed(tokenizer: Tokenizer, skip: bool) -> None:
    """Nor is one that only the tokenizer's files name, which the engine reports like a stop id."""
    (one,) = encode(tokenizer, "one")
    params = SamplingParams(logprobs=0, include_stop_str_in_output=True, skip_special_tokens=skip)
    choice = Choice(0, tokenizer, params, chat=True)
    deltas = play(choice, [event([one]), event([EOS], finish=FinishReason.STOP, stop_reason=EOS)])
    assert [token.token_id for delta in deltas for token in delta.tokens] == [one]
    assert choice.num_tokens == 2


def test_an_ignored_end_of_sequence_is_listed_without_text(tokenizer: Tokenizer) -> None:
    one, two = encode(tokenizer, "one two")
    choice = Choice(0, tokenizer, SamplingParams(logprobs=0, ignore_eos=True), chat=True)
    deltas = play(choice, events_of([one, EOS, two], eos=False))
    check_shape(deltas)
    assert text_of(deltas) == "one two"
    assert [(token.token_id, token.offset) for delta in deltas for token in delta.tokens] == [
        (one, 0),
        (EOS, 3),
        (two, 3),
    ]


def test_an_answer_of_nothing(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer, SamplingParams(logprobs=0), chat=True)
    deltas = choice.push(event([EOS], finish=FinishReason.STOP, cached=16))
    assert deltas == [ChoiceDelta(0, "", (), "stop")]
    assert choice.num_tokens == 1
    assert choice.num_cached_tokens == 16


def test_an_echo_comes_first_and_moves_the_offsets(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Say héllo")
    tokens = encode(tokenizer, "one two")
    params = SamplingParams(logprobs=1, prompt_logprobs=1)
    choice = Choice(0, tokenizer, params, chat=False, echo=Echo("Say héllo", tuple(prompt)))
    deltas = play(choice, [event(tokens[:1], prompt=prompt), event(tokens[1:], finish=FinishReason.LENGTH)])
    check_shape(deltas)
    assert [delta.text for delta in deltas] == ["Say héllo", " one", " two", ""]
    listed = [token for delta in deltas for token in delta.tokens]
    assert [token.token_id for token in listed] == prompt + tokens
    assert listed[0].logprob is None
    assert all(token.logprob == fake_logprob(token.token_id) for token in listed[1:])
    whole = text_of(deltas)
    pieces = [whole[token.offset : after.offset] for token, after in pairwise(listed)]
    assert pieces == ["", "Say", " h", "é", "ll", "o", " one"]
    assert choice.num_tokens == 2, "the echoed prompt is not generated"


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Say</s>no more", ["", "Say", "</s>", "no", " more"]),  # the tokenizer puts a space before "no"
        ("Say</s> no", ["", "Say", "</s>", " ", "no"]),
        ("</s>é</s></s>", ["", "</s>", "é", "</s>", "</s>"]),
    ],
)
def test_a_control_token_written_in_an_echoed_prompt_has_its_place(
    tokenizer: Tokenizer, text: str, pieces: list[str]
) -> None:
    assert echoed_pieces(tokenizer, Echo(text, tuple(tokenizer.encode(text)))) == pieces


def test_a_control_token_given_as_an_id_has_none(tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Say</s>no")
    assert echoed_pieces(tokenizer, Echo(tokenizer.decode(prompt), tuple(prompt))) == ["", "Say", "", " no"]


def echoed_pieces(tokenizer: Tokenizer, echo: Echo) -> list[str]:
    """The echoed text, cut where the offsets of its tokens say."""
    choice = Choice(0, tokenizer, SamplingParams(logprobs=1, prompt_logprobs=1), chat=False, echo=echo)
    delta = choice.push(event([], prompt=list(echo.prompt_ids), finish=FinishReason.LENGTH))[0]
    assert [token.token_id for token in delta.tokens] == list(echo.prompt_ids)
    return [
        echo.text[start:end] for start, end in pairwise([*(token.offset for token in delta.tokens), len(echo.text)])
    ]


def test_an_echo_without_text_brings_no_empty_delta(tokenizer: Tokenizer) -> None:
    prompt, tokens = [1, 2], encode(tokenizer, "one two")
    params = SamplingParams(logprobs=1, prompt_logprobs=1)
    choice = Choice(0, tokenizer, params, chat=False, echo=Echo("", tuple(prompt)))
    deltas = play(choice, [event(tokens[:1], prompt=prompt), event(tokens[1:], finish=FinishReason.LENGTH)])
    check_shape(deltas)
    assert [token.token_id for token in deltas[0].tokens] == [*prompt, tokens[0]]
    assert text_of(deltas) == " one two"


def test_an_echo_without_scores(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer, SamplingParams(), chat=False, echo=Echo("Say", (1, 5)))
    deltas = choice.push(event([], logprobs=False, finish=FinishReason.LENGTH))
    assert deltas == [ChoiceDelta(0, "Say"), ChoiceDelta(0, "", (), "length")]
    assert choice.num_tokens == 0


@pytest.mark.parametrize("reason", [FinishReason.ERROR, FinishReason.ABORT])
def test_a_failure_is_raised(tokenizer: Tokenizer, reason: FinishReason) -> None:
    choice = Choice(0, tokenizer, SamplingParams(), chat=True)
    with pytest.raises(RequestFailedError, match="why" if reason is FinishReason.ERROR else "abort"):
        choice.push(event([], finish=reason, error="why" if reason is FinishReason.ERROR else None))


def test_however_tokens_arrive_the_answer_is_the_same(tokenizer: Tokenizer) -> None:
    """Random answers with random stop strings, in events of random sizes: text, tokens and count do not change, tokens'
    bytes are the text's, and offsets rise with them.
    """
    rng = random.Random(0)
    words = ["one", "two", "🦜", "日本", "naïve", "\n", "  ", "STOP", "ST"]
    for _ in range(150):
        text = "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(1, 12)))
        start = rng.randrange(len(text))
        stop = (text[start : start + rng.randint(1, 6)],) if rng.random() < 0.7 else ("zzz",)
        params = SamplingParams(logprobs=1, stop=stop)
        tokens, eos = encode(tokenizer, text), rng.random() < 0.5
        results = []
        for sizes in ([1] * (len(tokens) + 1), [rng.randint(1, 4) for _ in tokens] + [len(tokens)], [len(tokens) + 1]):
            choice = Choice(0, tokenizer, params, chat=False)
            deltas = play(choice, events_of(tokens, sizes, eos=eos))
            check_shape(deltas)
            listed = [token for delta in deltas for token in delta.tokens]
            results.append((text_of(deltas), listed, choice.num_tokens, choice.finish_reason))
        assert results[0] == results[1] == results[2]
        whole, listed, num_tokens, _ = results[0]
        assert stop[0] not in whole
        data = b"".join(tokenizer.token_bytes(token.token_id) for token in listed)
        assert data.startswith(whole.encode())
        assert [token.offset for token in listed] == sorted(token.offset for token in listed)
        assert all(token.offset < len(whole) for token in listed)
        ended = eos and " " + text == whole
        assert num_tokens == len(listed) + ended
