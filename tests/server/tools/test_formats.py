import re

import pytest

from engine.text import Tokenizer
from server.tools.formats import CallFormat, call_format


@pytest.mark.parametrize(
    ("kind", "name", "opening"),
    [
        ("mistral", "mistral", ("\ufdd0",)),
        ("mistral text", "mistral", ("[TOOL_CALLS]",)),
        ("hermes", "hermes", ("\ufdd0",)),
        ("hermes text", "hermes", ("<tool_call>",)),
        ("none", "hermes", ("\ufdd0", "<tool_call>")),
    ],
)
def test_the_template_chooses(formats: dict[str, CallFormat], kind: str, name: str, opening: tuple[str, ...]) -> None:
    form = formats[kind]
    assert (form.name, form.opening) == (name, opening)
    assert form.marker in ("[TOOL_CALLS]", "<tool_call>")


def test_the_flag_goes_before_the_template(tokenizers: dict[str, Tokenizer]) -> None:
    form = call_format("hermes", tokenizers["mistral"])
    assert (form.name, form.opening, form.marks) == ("hermes", ("<tool_call>",), {})
    form = call_format("mistral", tokenizers["hermes"])
    assert (form.name, form.opening, form.marks) == ("mistral", ("[TOOL_CALLS]",), {})


def test_a_tokenizer_without_a_template(tokenizer: Tokenizer) -> None:
    form = call_format("auto", tokenizer)
    assert (form.name, form.opening, form.control_ids, form.signs) == ("hermes", ("<tool_call>",), {}, {})


def test_control_tokens_have_signs_of_their_own(
    tokenizers: dict[str, Tokenizer], formats: dict[str, CallFormat]
) -> None:
    for kind in ("mistral", "hermes", "none"):
        form, tokenizer = formats[kind], tokenizers[kind]
        assert len(form.marks) == len(form.signs) == (3 if form.name == "mistral" else 2)
        for token_id, sign in form.marks.items():
            assert tokenizer.token_text(token_id) == form.signs[sign]
            assert re.fullmatch("[\ufdd0-\ufdef]", sign)
        assert form.control_ids == ({} if kind == "none" else {form.signs[sign]: i for i, sign in form.marks.items()})
