"""The same text makes the same content and calls, however it is cut; and nothing of it is lost."""

from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from server.tools.formats import CallFormat
from tests.server.tools.kinds import KINDS
from tests.server.tools.reading import MARKERS, F, G, as_stream, outcome, parse, read

FRAGMENTS = [*MARKERS, F, G, "[", "]", ", ", "f", "{", "}", '"', "<tool_", "[TOOL", " ", "\n", "é", ":", "\\", "1"]
CUTS = st.lists(st.integers(0, 400), max_size=12)
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@settings(max_examples=500, deadline=None)
@given(kind=st.sampled_from(KINDS), text=TEXTS, cuts=CUTS, shows=st.booleans())
def test_cuts_make_no_difference(
    formats: dict[str, CallFormat], kind: str, text: str, cuts: list[int], shows: bool
) -> None:
    form = formats[kind]
    whole = read(form, text, shows_special=shows)
    assert read(form, text, cuts=cuts, shows_special=shows) == whole
    assert read(form, text, cuts=range(len(text)), shows_special=shows) == whole
    content, calls, num_whole = whole
    parsed = [call for call in calls if _is_object(call[1])]
    assert len(parsed) == num_whole
    assert not any("\ufdd0" <= char <= "\ufdef" for char in content + "".join(map("".join, calls)))


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(KINDS), text=st.text(max_size=60), cuts=CUTS)
def test_text_without_markers_passes(formats: dict[str, CallFormat], kind: str, text: str, cuts: list[int]) -> None:
    form = formats[kind]
    if any(sign in text for sign in (*form.opening, *form.signs)):
        return
    parser, pushes = parse(form, text, cuts)
    assert outcome(parser, pushes) == (text, [], 0)


WORDS = st.text(st.characters(exclude_characters=[chr(code) for code in range(0xFDD0, 0xFDF0)]), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
MADE = st.lists(
    st.tuples(st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True), st.dictionaries(WORDS, VALUES)),
    min_size=1,
    max_size=3,
)


@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    calls=MADE,
    before=WORDS,
    cuts=CUTS,
    ascii_only=st.booleans(),
    separators=st.sampled_from([(", ", ": "), (",", ":"), (" ,\n", " : ")]),
)
def test_calls_come_back(
    formats: dict[str, CallFormat],
    kind: str,
    calls: list[tuple[str, dict[str, object]]],
    before: str,
    cuts: list[int],
    ascii_only: bool,
    separators: tuple[str, str],
) -> None:
    form = formats[kind]
    texts = [(name, json.dumps(value, ensure_ascii=ascii_only, separators=separators)) for name, value in calls]
    objects = [f'{{"name": "{name}", "arguments": {text}}}' for name, text in texts]
    if any(sign[0] in before for sign in form.opening):
        return
    if form.name == "mistral":
        text = f"{as_stream('[TOOL_CALLS]', form)}[{', '.join(objects)}]"
    else:
        opening, closing = as_stream("<tool_call>", form), as_stream("</tool_call>", form)
        text = "\n".join(f"{opening}\n{item}\n{closing}" for item in objects)
    said = "" if before.isspace() else before
    assert outcome(*parse(form, before + text, cuts)) == (said, texts, len(texts))
