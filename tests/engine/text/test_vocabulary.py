import json
from collections.abc import Sequence
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.text import Tokenizer
from engine.text.vocabulary import Vocabulary
from tests.engine.text.checkpoints import MIXTRAL
from weights.errors import CheckpointError

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
TOKENS = ["▁a", "Ġa", "<0x0A>", "Ã©"]


def vocabulary(decoder: Any, pre_tokenizer: Any = None, added: Sequence[dict[str, Any]] = ()) -> Vocabulary:
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "decoder": decoder,
        "pre_tokenizer": pre_tokenizer,
        "model": {"type": "BPE", "vocab": {token: index for index, token in enumerate(TOKENS)}, "merges": []},
    }
    return Vocabulary.of(spec, tokenizers.Tokenizer.from_str(json.dumps(spec)))


def sequence(*parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", "decoders": list(parts)}


@pytest.mark.parametrize(
    ("decoder", "pre_tokenizer", "pieces", "drops"),
    [
        (BYTE_LEVEL, None, ["▁a", " a", "<0x0A>", "é"], False),
        (None, BYTE_LEVEL, ["▁a", " a", "<0x0A>", "é"], False),
        (sequence(sequence({"type": "Fuse"}), BYTE_LEVEL), METASPACE, ["▁a", " a", "<0x0A>", "é"], False),
        (METASPACE, None, [" a", "Ġa", "<0x0A>", "Ã©"], True),
        (METASPACE | {"prepend_scheme": "never"}, None, [" a", "Ġa", "<0x0A>", "Ã©"], False),
        (sequence(REPLACE, {"type": "ByteFallback"}, STRIP), None, [" a", "Ġa", "\n", "Ã©"], True),
        (sequence(REPLACE, {"type": "ByteFallback"}), BYTE_LEVEL, [" a", "Ġa", "\n", "Ã©"], False),
    ],
)
def test_the_kind_is_the_decoders(decoder: Any, pre_tokenizer: Any, pieces: list[str], drops: bool) -> None:
    known = vocabulary(decoder, pre_tokenizer)
    assert [known.token_bytes(index).decode() for index in range(len(TOKENS))] == pieces
    assert known.drops_leading_space == drops


def test_added_tokens_are_their_own_text() -> None:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": 4, "content": "<｜é▁|>", "special": True, **flags},
        {"id": 5, "content": "é", "special": False, **flags},
        {"id": 6, "content": "▁y", "special": False, **flags},
    ]
    byte_level = vocabulary(BYTE_LEVEL, added=added)
    assert [byte_level.token_bytes(token_id).decode() for token_id in (4, 5, 6)] == ["<｜é▁|>", "é", "▁y"]
    assert byte_level.special_ids == frozenset({4})
    assert byte_level.size == 7
    pieces = vocabulary(METASPACE, added=added)
    assert [pieces.token_bytes(token_id).decode() for token_id in (4, 5, 6)] == ["<｜é▁|>", "é", " y"]


@pytest.mark.parametrize(
    "decoder", [None, {"type": "Fuse"}, sequence(), {"type": "WordPiece", "prefix": "##", "cleanup": True}]
)
def test_other_kinds_are_refused(decoder: Any) -> None:
    with pytest.raises(CheckpointError, match=r"^tokenizer\.json: the decoder is .* are supported$"):
        vocabulary(decoder)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_bytes_are_those_of_the_library_byte_level(chatml: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, chatml.vocab_size - 1), max_size=12))
    library = tokenizers.Tokenizer.from_str(chatml._tokenizer.to_str())
    joined = b"".join(map(chatml.token_bytes, ids))
    assert joined.decode(errors="replace") == library.decode(ids, skip_special_tokens=False)


def test_bytes_are_those_of_the_library_for_every_mixtral_token(mixtral: Tokenizer) -> None:
    library = tokenizers.Tokenizer.from_file(str(MIXTRAL / "tokenizer.json"))
    for token_id in range(mixtral.vocab_size):
        # the library's decoder drops the first space of a text, so a token is put behind another
        text = library.decode([264, token_id], skip_special_tokens=False).removeprefix("a")
        assert mixtral.token_text(token_id) == text
