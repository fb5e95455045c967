import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import Detokenizer, Tokenizer
from tests.engine.text.checkpoints import MIXTRAL

SAMPLES = [
    "Hello world",
    "  leading and trailing  ",
    "line\r\nline\n\n\ttab",
    "混合专家模型，世界",
    "👩‍👩‍👧 family, 🏳️‍🌈 flag, 👍🏽 skin",
    "Ünïcödé cafe\u0301",
    "مرحبا שלום",
    "a\0b",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
LIBRARY = tokenizers.Tokenizer.from_file(str(MIXTRAL / "tokenizer.json"))


def detokenizer(tokenizer: Tokenizer, *, skip: bool = True, drop: bool = False) -> Detokenizer:
    return Detokenizer(tokenizer.vocabulary, skip_special_tokens=skip, drop_leading_space=drop)


def texts(tokenizer: Tokenizer, ids: list[int], *, skip: bool = True, drop: bool = False) -> list[str]:
    decoder = detokenizer(tokenizer, skip=skip, drop=drop)
    return [*map(decoder.push, ids), decoder.finish()]


@pytest.mark.parametrize("text", SAMPLES)
def test_text_comes_back_whole(any_kind: Tokenizer, text: str) -> None:
    ids = any_kind.encode(text)
    assert "".join(texts(any_kind, ids, drop=True)) == text
    if any_kind.vocabulary.drops_leading_space:
        assert "".join(texts(any_kind, ids)) == " " + text
    assert texts(any_kind, ids)[-1] == ""


@pytest.mark.parametrize("text", SAMPLES)
def test_a_character_comes_with_the_token_that_completes_it(any_kind: Tokenizer, text: str) -> None:
    decoder = detokenizer(any_kind)
    seen = b""
    given_out = ""
    for token_id in any_kind.encode(text, add_special_tokens=False):
        seen += any_kind.token_bytes(token_id)
        given_out += decoder.push(token_id)
        assert "\ufffd" not in given_out
        assert given_out == seen.decode(errors="ignore")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_ids_byte_level(chatml: Tokenizer, data: st.DataObject) -> None:
    """Also where the bytes are not UTF-8: the library, too, replaces each maximal invalid part."""
    ids = data.draw(st.lists(st.integers(0, chatml.vocab_size - 1), max_size=20))
    library = tokenizers.Tokenizer.from_str(chatml._tokenizer.to_str())
    for skip in (True, False):
        joined = "".join(texts(chatml, ids, skip=skip))
        assert joined == library.decode(ids, skip_special_tokens=skip)
        assert joined == chatml.decode(ids, skip_special_tokens=skip)


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.integers(0, 400) | st.integers(0, 31999), max_size=20))
def test_any_ids_sentencepiece(mixtral: Tokenizer, ids: list[int]) -> None:
    """The library decodes runs of byte tokens on their own: equal wherever no byte has to be replaced."""
    joined = "".join(texts(mixtral, ids, drop=True))
    assert joined == mixtral.decode(ids)
    if "\ufffd" not in joined and 0 not in ids:
        assert joined == LIBRARY.decode(ids)


@given(raw=st.binary(max_size=16))
def test_any_bytes(mixtral: Tokenizer, raw: bytes) -> None:
    """Token 3 + n is byte n."""
    assert "".join(texts(mixtral, [3 + byte for byte in raw])) == raw.decode(errors="replace")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\xe4\xb8\x96", ["", "", "世", ""]),
        (b"\xe4a", ["", "\ufffda", ""]),  # known to be invalid only with the next byte
        (b"\xff\xfea", ["\ufffd", "\ufffd", "a", ""]),  # known at once
        (b"\xf0\x9f\x8e", ["", "", "", "\ufffd"]),  # never completed
        (b"a\xcc\x81", ["a", "", "\u0301", ""]),  # a character is a code point: no waiting for marks
    ],
)
def test_when_bytes_become_text(mixtral: Tokenizer, raw: bytes, expected: list[str]) -> None:
    assert texts(mixtral, [3 + byte for byte in raw]) == expected


def test_special_tokens_are_skipped_or_shown(mixtral: Tokenizer) -> None:
    ids = [1, 22557, 2, 1526]
    assert texts(mixtral, ids) == ["", " Hello", "", " world", ""]
    assert texts(mixtral, ids, drop=True) == ["", "Hello", "", " world", ""]
    assert texts(mixtral, ids, skip=False, drop=True) == ["<s>", " Hello", "</s>", " world", ""]


def test_one_leading_space_is_dropped_and_no_more(mixtral: Tokenizer) -> None:
    space, two_spaces = 28705, 259
    assert texts(mixtral, [two_spaces, space], drop=True) == [" ", " ", ""]
    assert texts(mixtral, [space, space], drop=True) == ["", " ", ""]
    assert texts(mixtral, [], drop=True) == [""]


def test_byte_level_keeps_the_leading_space(chatml: Tokenizer) -> None:
    assert "".join(texts(chatml, chatml.encode(" world"), drop=True)) == " world"


def test_a_mark_ends_a_character_that_is_not_whole(mixtral: Tokenizer) -> None:
    detokenizer = Detokenizer(
        mixtral.vocabulary, skip_special_tokens=True, drop_leading_space=False, marks={1: "\ufdd0"}
    )
    ids = [3 + 0xE4, 3 + 0xB8, 1, 3 + 0x96, 1, 1]
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "\ufffd\ufdd0", "\ufffd", "\ufdd0", "\ufdd0"]
    assert detokenizer.finish() == ""


def test_no_other_token_writes_a_mark(mixtral: Tokenizer) -> None:
    written = "a\ufdd0b\ufdd1"
    ids = [3 + byte for byte in written.encode()]
    marked = Detokenizer(mixtral.vocabulary, skip_special_tokens=True, drop_leading_space=False, marks={1: "\ufdd0"})
    assert "".join(marked.push(token_id) for token_id in [*ids, 1]) == "a\ufffdb\ufdd1\ufdd0"
    assert "".join(texts(mixtral, ids)) == written


@pytest.mark.parametrize("skip", [False, True])
def test_marks_go_before_the_tokens_own_text(mixtral: Tokenizer, skip: bool) -> None:
    detokenizer = Detokenizer(
        mixtral.vocabulary, skip_special_tokens=skip, drop_leading_space=True, marks={1: "\ufdd0", 22557: "x"}
    )
    assert [detokenizer.push(token_id) for token_id in (1, 22557, 2, 22557)] == [
        "\ufdd0",
        "x",
        "" if skip else "</s>",
        "x",
    ]
    assert detokenizer.finish() == ""
