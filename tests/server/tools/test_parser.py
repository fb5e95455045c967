"""Calls in answers, what looks like one, and what comes when."""

from __future__ import annotations

import re

import pytest

from engine.text import TextStream, Tokenizer
from engine.types import SamplingParams
from server.tools.formats import CallFormat
from server.tools.parser import CallArguments, CallBegun, CallParser, Said
from tests.server.tools.kinds import KINDS
from tests.server.tools.reading import F, G, arguments, hermes, outcome, parse, read

CALLS = [("f", "{}"), ("g_2", arguments(G))]


@pytest.mark.parametrize("kind", ["hermes", "hermes text", "none"])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (hermes(F), "", CALLS[:1]),
        (hermes(F, G), "", CALLS),
        (f"\n {hermes(F)}\n", "", CALLS[:1]),
        (f"Let me see.\n{hermes(G, F)}", "Let me see.\n", [CALLS[1], CALLS[0]]),
        (f"{hermes(F)}\nand {hermes(F)} end ", "\nand  end ", [CALLS[0]] * 2),
        (f"<tool_call>{F}</tool_call><tool_call>{F}</tool_call>", "", [CALLS[0]] * 2),
        (f"<tool_call>{F}", "", CALLS[:1]),
        (f"<tool_call>{F} so", " so", CALLS[:1]),
        ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", [("f", '{"a": 1}')]),
        ('<tool_call>{"id": "7", "name": "f", "type": "x", "arguments": {} , "k" : "v"} </tool_call>', "", CALLS[:1]),
        ('<tool_call>{"n\\u0061me": "\\u0066", "arguments": {"\\u00e9": "é"}}', "", [("f", '{"\\u00e9": "é"}')]),
        (f"<tool_call>\n<tool_call>{F}</tool_call>", "<tool_call>\n", CALLS[:1]),
        (f"<tool_<tool_call>{F}</tool_call>", "<tool_", CALLS[:1]),
    ],
)  # fmt: skip
def test_hermes_calls(
    formats: dict[str, CallFormat], kind: str, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    if formats[kind].signs:
        content = content.replace("<tool_call>", "")
    assert read(formats[kind], text) == (content, calls, len(calls))


@pytest.mark.parametrize("kind", ["hermes", "mistral"])
def test_a_sign_that_the_model_writes_is_none(
    tokenizers: dict[str, Tokenizer], formats: dict[str, CallFormat], kind: str
) -> None:
    form, tokenizer = formats[kind], tokenizers[kind]
    stream = TextStream(tokenizer, SamplingParams(), chat=True, marks=form.marks)
    call = f"[{F}]" if form.name == "mistral" else F
    ids = tokenizer.encode(f"\ufdd0{call}{form.marker}{call}", add_special_tokens=False)
    parsed = parse(form, stream.push(ids).text + stream.finish())
    assert outcome(*parsed) == (f"\ufffd{call}", CALLS[:1], 1)


@pytest.mark.parametrize("kind", ["mistral", "mistral text"])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (f"[TOOL_CALLS][{F}]", "", CALLS[:1]),
        (f"[TOOL_CALLS] [{F}, {G}]\n", "", CALLS),
        (f'[TOOL_CALLS][{F[:-1]}, "id": "123456789"}}]', "", CALLS[:1]),
        (f"I look.[TOOL_CALLS][{F}] Done.", "I look. Done.", CALLS[:1]),
        (f"[TOOL_CALLS][{F}", "", CALLS[:1]),
        (f"[TOOL_CALLS][{F}, ", ", ", CALLS[:1]),
        (f"[TOOL_CALLS][{F}, 5]", ", 5]", CALLS[:1]),
        ('[TOOL_CALLS]f{"a": 1}', "", [("f", '{"a": 1}')]),
        ("[TOOL_CALLS]f[ARGS]{}[TOOL_CALLS]g_2[ARGS] {}", "", [("f", "{}"), ("g_2", "{}")]),
        ("[TOOL_CALLS] f [ARGS]{}", "", []),
        ("[TOOL_CALLS]f[CALL_ID]ab12[ARGS]{}", "", CALLS[:1]),
        ("[TOOL_CALLS] f {}x", "x", CALLS[:1]),
    ],
)
def test_mistral_calls(
    formats: dict[str, CallFormat], kind: str, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    if not calls:
        content = text if kind == "mistral text" else " f {}"
    assert read(formats[kind], text) == (content, calls, len(calls))


def test_hermes_markers_as_text(formats: dict[str, CallFormat]) -> None:
    form = formats["hermes text"]
    assert read(form, f"<tool_call>{F}\n</tool_c") == ("", CALLS[:1], 1)
    cut = '<tool_call>{"name": "f'
    assert read(form, f"{hermes(F)}\n{cut}") == (f"\n{cut}", CALLS[:1], 1)
    assert read(form, f"<tool_call>{F}\n</tool_c a") == ("\n</tool_c a", CALLS[:1], 1)
    inside = '{"a": "<tool_call></tool_call>"}'
    assert read(form, hermes(f'{{"name": "f", "arguments": {inside}}}')) == ("", [("f", inside)], 1)


def test_ids(formats: dict[str, CallFormat]) -> None:
    for kind, pattern in (("mistral", r"[A-Za-z0-9]{9}"), ("hermes", r"call_[0-9a-f]{24}")):
        ids = {formats[kind].new_id() for _ in range(50)}
        assert len(ids) == 50
        assert all(re.fullmatch(pattern, call_id) for call_id in ids)


MALFORMED = [
    "<tool_call>",
    "<tool_call>\nhello",
    "<tool_call>[]</tool_call>",
    '<tool_call>{"name": "f"}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": "{}"}</tool_call>',
    '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
    '<tool_call>{"name": 5, "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f f", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    f'<tool_call>{{"name": "{"f" * 65}", "arguments": {{}}}}</tool_call>',
    '<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}, "arguments": {}, "name": "g"}</tool_call>',
    '<tool_call>{"arguments": {"a": }, "name": "f"}</tool_call>',
    '<tool_call>{"id": 5, "name": "f", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "f\n", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    "<tool_call>{'name': 'f', 'arguments': {}}</tool_call>",
    "<tool_call></tool_call>",
    "</tool_call>",
    "<tool_cal",
    "[TOOL_CALLS]",
    "[TOOL_CALLS][]",
    "[TOOL_CALLS] hello there",
    "[TOOL_CALLS]{}",
    "[TOOL_CALLS]f",
    f"[TOOL_CALLS]{'f' * 65}{{}}",
    "[TOOL_CALLS]é{}",
    "[TOOL_CALLS]f[ARGS]x",
    "[TOOL_CALLS]f[ARG]{}",
    "[TOOL_CALLS]f[CALL_ID]abc{}",
    "[TOOL_CALLS][{]",
    "[TOOL_CALLS][{}]",
    "[TOOL_CALL",
    "   \n",
    "",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", MALFORMED)
@pytest.mark.parametrize("before", ["", "Well: ", " "])
def test_what_is_no_call_is_content(formats: dict[str, CallFormat], kind: str, text: str, before: str) -> None:
    form = formats[kind]
    assert read(form, before + text, shows_special=True) == (before + text, [], 0)
    hidden = before + text
    for marker in form.signs.values():
        hidden = hidden.replace(marker, "")
    assert read(form, before + text) == (hidden, [], 0)


@pytest.mark.parametrize("kind", ["hermes", "hermes text"])
@pytest.mark.parametrize(
    ("text", "content", "begun"),
    [
        ('{"name": "f", "arguments": {"a": }}</tool_call> x', "}}</tool_call> x", '{"a": '),
        ('{"name": "f", "arguments": {"a": tru', "", '{"a": tru'),
        ('{"name": "f", "arguments": {"a": 1-2}}', "}}", '{"a": 1-2'),
        ('{"name": "f", "arguments": {\n<tool_call>', "<tool_call>", "{\n"),
    ],
)
def test_a_call_that_breaks_after_its_name_was_sent(
    formats: dict[str, CallFormat], kind: str, text: str, content: str, begun: str
) -> None:
    """It stays begun, with what was JSON so far; the rest is content, and the call does not count."""
    form = formats[kind]
    if form.signs:
        content = content.replace("</tool_call>", "").replace("<tool_call>", "")
    assert read(form, f"<tool_call>{text}") == (content, [("f", begun)], 0)


def test_a_call_that_breaks_after_its_arguments(formats: dict[str, CallFormat]) -> None:
    text = '<tool_call>{"name": "f", "arguments": {}, "id": 5}</tool_call>'
    assert read(formats["hermes text"], text) == (', "id": 5}</tool_call>', [("f", "{}")], 1)


def test_written_out_markers_are_text_where_they_are_control_tokens(formats: dict[str, CallFormat]) -> None:
    for kind, text in (("hermes", hermes(F)), ("mistral", f"[TOOL_CALLS][{F}]")):
        assert outcome(*parse(formats[kind], text)) == (text, [], 0)
    # Where our own words asked for calls, the model may well write what it was shown.
    assert outcome(*parse(formats["none"], hermes(F))) == ("", CALLS[:1], 1)


def test_signs_in_arguments_do_not_come_out(formats: dict[str, CallFormat]) -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "<tool_call>"}}</tool_call>'
    assert read(formats["hermes"], text) == ('"}}', [("f", '{"a": "')], 0)
    assert read(formats["hermes text"], text) == ("", [("f", '{"a": "<tool_call>"}')], 1)


def test_text_is_sent_as_soon_as_it_can_be_no_marker(formats: dict[str, CallFormat]) -> None:
    parser = CallParser(formats["hermes text"], shows_special=False)
    assert parser.push("A <b> <tool_") == [Said("A <b> ")]
    assert parser.push("c") == []
    assert parser.push("alm") == [Said("<tool_calm")]
    assert parser.push("\n") == [Said("\n")]


def test_a_call_is_sent_as_it_comes(formats: dict[str, CallFormat]) -> None:
    parser = CallParser(formats["hermes text"], shows_special=False)
    assert parser.push("\n<tool_call>") == []
    assert parser.push('{"name": "f", "argu') == []
    assert parser.push('ments": ') == []
    begun, first = parser.push('{"a"')
    assert isinstance(begun, CallBegun)
    assert (begun.index, begun.name, first) == (0, "f", CallArguments(0, '{"a"'))
    assert parser.push(": 1") == [CallArguments(0, ": 1")]
    assert parser.num_whole == 0
    assert parser.push("}}") == [CallArguments(0, "}")]
    assert parser.num_whole == 1
    assert parser.push("</tool_call>\n<tool") == []
    second = parser.push('_call>{"name": "g", "arguments": {}}Hm')
    assert [type(piece) for piece in second] == [CallBegun, CallArguments, Said]
    assert parser.finish() == []


def test_very_many_markers(formats: dict[str, CallFormat]) -> None:
    """Time that is quadratic in their number would not end."""
    text = "<tool_call>" * 50_000
    parser = CallParser(formats["hermes text"], shows_special=False)
    pieces = [piece for start in range(0, len(text), 1024) for piece in parser.push(text[start : start + 1024])]
    assert sum(len(piece.text) for piece in [*pieces, *parser.finish()] if isinstance(piece, Said)) == len(text)


def test_a_long_answer_in_small_deltas(formats: dict[str, CallFormat]) -> None:
    parser = CallParser(formats["hermes text"], shows_special=False)
    assert sum(len(parser.push(" ")) for _ in range(200_000)) == 0
    assert parser.finish() == [Said(" " * 200_000)]
