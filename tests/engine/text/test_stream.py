from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import Detokenizer, TextDelta, TextStream, Tokenizer
from engine.types import SamplingParams


@dataclass
class Outcome:
    text: str
    stop: str | None
    num_read: int
    num_tokens: int


def stream_in_chunks(stream: TextStream, ids: list[int], sizes: list[int]) -> Outcome:
    """Pushes `ids` in chunks of these sizes (then one by one), and checks what holds for every delta."""
    text, num_read, position = "", 0, 0
    while position < len(ids):
        size = sizes.pop() if sizes else 1
        chunk = ids[position : position + size]
        position += size
        delta = stream.push(chunk)
        text += delta.text
        num_read += delta.num_tokens
        if delta.stop is not None:
            assert stream.push(ids) == TextDelta("", delta.stop, 0)
            assert stream.finish() == ""
            return Outcome(text, delta.stop, num_read, stream.num_tokens)
        assert delta.num_tokens == len(chunk)
        assert stream.num_tokens == position if position <= len(ids) else len(ids)
    text += stream.finish()
    assert stream.finish() == ""
    return Outcome(text, None, num_read, stream.num_tokens)


def expected(tokenizer: Tokenizer, ids: list[int], params: SamplingParams, *, chat: bool) -> Outcome:
    """The slow and plain way: decode everything, look at every character whether a stop string ends there."""
    decoder = Detokenizer(tokenizer.vocabulary, skip_special_tokens=params.skip_special_tokens, drop_leading_space=chat)
    parts = [decoder.push(token_id) for token_id in ids]
    text = "".join(parts)
    writer = [number for number, part in enumerate(parts, start=1) for _ in part]  # of each character
    starts = [sum(map(len, parts[:index])) for index in range(len(parts))]
    for end in range(1, len(text) + 1):
        found = [stop for stop in params.stop if text[:end].endswith(stop)]
        if found and writer[end - 1] > params.min_tokens:
            stop = max(found, key=len)
            cut = end if params.include_stop_str_in_output else end - len(stop)
            kept = sum(start < cut for start in starts[: writer[end - 1]])
            return Outcome(text[:cut], stop, writer[end - 1], kept)
    return Outcome(text + decoder.finish(), None, len(ids), len(ids))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_stream_equals_the_whole_cut_at_the_first_stop(
    chatml: Tokenizer, pieces: Tokenizer, data: st.DataObject
) -> None:
    tokenizer = data.draw(st.sampled_from([chatml, pieces]))
    letters = data.draw(st.sampled_from(["ab", "ab ", "aé世🎉<s>"]))
    text = data.draw(st.text(letters, max_size=25))
    ids = tokenizer.encode(text, add_special_tokens=False)
    # anything may be generated, half characters and special tokens too
    odd = st.integers(0, tokenizer.vocab_size - 1)
    for position in data.draw(st.lists(st.integers(0, len(ids)), max_size=3)):
        ids.insert(position, data.draw(odd))
    params = SamplingParams(
        stop=tuple(data.draw(st.lists(st.text(letters, min_size=1, max_size=5), max_size=4))),
        min_tokens=data.draw(st.sampled_from([0, 0, 1, 5])),
        include_stop_str_in_output=data.draw(st.booleans()),
        skip_special_tokens=data.draw(st.booleans()),
    )
    chat = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 6), max_size=10))
    outcome = stream_in_chunks(TextStream(tokenizer, params, chat=chat), ids, sizes)
    assert outcome == expected(tokenizer, ids, params, chat=chat)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 300) | st.integers(0, 31999), max_size=20), sizes=st.lists(st.integers(1, 5)))
def test_without_stop_strings_the_stream_is_decode(mixtral: Tokenizer, ids: list[int], sizes: list[int]) -> None:
    outcome = stream_in_chunks(TextStream(mixtral, SamplingParams(), chat=True), ids, sizes)
    assert outcome == Outcome(mixtral.decode(ids), None, len(ids), len(ids))


def bytewise(text: str) -> list[int]:
    """Mixtral's ids for each byte on its own."""
    return [3 + byte for byte in text.encode()]


def deltas(tokenizer: Tokenizer, text: str, *stop: str, **options: bool | int) -> list[str]:
    """What comes out byte by byte, up to a stop string; without one, the last is what was flushed."""
    stream = TextStream(tokenizer, SamplingParams(stop=stop, **options))  # type: ignore[arg-type]
    out = []
    for token_id in bytewise(text):
        delta = stream.push([token_id])
        out.append(delta.text)
        if delta.stop is not None:
            return out
    return [*out, stream.finish()]


def test_only_what_could_become_a_stop_string_is_held_back(mixtral: Tokenizer) -> None:
    assert deltas(mixtral, "abSTx", "STOP") == ["a", "b", "", "", "STx", ""]
    assert deltas(mixtral, "SSTOP", "STOP") == ["", "S", "", "", ""]
    assert deltas(mixtral, "aST", "STOP") == ["a", "", "", "ST"]
    assert deltas(mixtral, "ababac", "abac") == ["", "", "", "ab", "", ""]
    assert deltas(mixtral, "aé", "é!") == ["a", "", "", "é"]


def test_a_stop_string_over_half_characters(mixtral: Tokenizer) -> None:
    assert deltas(mixtral, "x世界y", "世界") == ["x", "", "", "", "", "", ""]


def test_the_first_to_be_complete_wins(mixtral: Tokenizer) -> None:
    assert "".join(deltas(mixtral, "xabcd", "abcd", "bc")) == "xa"
    assert "".join(deltas(mixtral, "xabcd", "bc", "abc")) == "x"  # both end with c: the longer


def test_it_wins_however_the_tokens_are_cut(chatml: Tokenizer) -> None:
    """The token "STOP" holds both stop strings whole."""
    ids = chatml.encode("xSTOP", add_special_tokens=False)
    assert len(ids) == 2
    stream = TextStream(chatml, SamplingParams(stop=("STOP", "TO")))
    assert stream.push(ids) == TextDelta("xS", "TO", 2)
    assert stream.num_tokens == 2


def test_tokens_up_to_the_cut(mixtral: Tokenizer) -> None:
    stream = TextStream(mixtral, SamplingParams(stop=("cd",)))
    assert stream.push(bytewise("abcdef")) == TextDelta("ab", "cd", 4)
    assert stream.num_tokens == 2
    stream = TextStream(mixtral, SamplingParams(stop=("cd",), include_stop_str_in_output=True))
    assert stream.push(bytewise("abcdef")) == TextDelta("abcd", "cd", 4)
    assert stream.num_tokens == 4


def test_min_tokens(mixtral: Tokenizer) -> None:
    assert "".join(deltas(mixtral, "a.b.c", ".", min_tokens=1)) == "a"
    assert "".join(deltas(mixtral, "a.b.c", ".", min_tokens=2)) == "a.b"
    assert "".join(deltas(mixtral, "ab.", "ab", min_tokens=2)) == "ab."
    assert "".join(deltas(mixtral, "xab.", "ab", min_tokens=2)) == "x"  # complete with the third
    assert "".join(deltas(mixtral, "ababa", "aba", min_tokens=3)) == "ab"  # the second overlaps the first


def test_the_token_that_ended_the_sequence_is_silent(mixtral: Tokenizer) -> None:
    params = SamplingParams(skip_special_tokens=False)
    assert TextStream(mixtral, params).push([22557, 2], stopped=True) == TextDelta(" Hello", None, 2)
    assert TextStream(mixtral, params).push([22557, 2]) == TextDelta(" Hello</s>", None, 2)
    shown = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    assert TextStream(mixtral, shown).push([22557, 2], stopped=True) == TextDelta(" Hello</s>", None, 2)
    stream = TextStream(mixtral, params)
    stream.push([22557, 2], stopped=True)
    assert (stream.num_tokens, stream.finish()) == (2, "")


def test_a_stop_string_before_that_token(mixtral: Tokenizer) -> None:
    stream = TextStream(mixtral, SamplingParams(stop=("llo",)))
    assert stream.push([22557, 2], stopped=True) == TextDelta(" He", "llo", 1)
    assert stream.num_tokens == 1


def test_chat_drops_the_leading_space_and_completions_keep_it(mixtral: Tokenizer) -> None:
    assert TextStream(mixtral, SamplingParams(), chat=True).push([22557]).text == "Hello"
    assert TextStream(mixtral, SamplingParams()).push([22557]).text == " Hello"


def test_pushing_nothing(mixtral: Tokenizer) -> None:
    stream = TextStream(mixtral, SamplingParams(stop=("x",)))
    assert stream.push([]) == stream.push([], stopped=True) == TextDelta("", None, 0)
    assert stream.finish() == ""


@pytest.mark.parametrize("length", [1_000, 100_000])
def test_long_stop_strings_cost_no_more(mixtral: Tokenizer, length: int) -> None:
    """20,000 tokens that look like the stop string until its last character: quadratic work would take minutes."""
    stream = TextStream(mixtral, SamplingParams(stop=("a" * length + "b",) * 2))
    text = "".join(stream.push([3 + ord("a")]).text for _ in range(20_000))
    assert text + stream.finish() == "a" * 20_000
