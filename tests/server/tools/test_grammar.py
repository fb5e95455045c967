"""What a grammar lets a model write, at random, is calls; and whole calls are let through."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from engine.grammar import GrammarError, GrammarSpec, Matcher
from engine.grammar.build import build, check
from engine.grammar.matcher import num_bytes
from engine.grammar.vocabulary import GrammarVocabulary
from engine.text import TextStream, Tokenizer
from engine.types import SamplingParams
from server.protocol.tools import Tool
from server.tools.formats import CallFormat, call_format
from server.tools.grammar import answer_or_calls, calls_only, text_and_one_call
from server.tools.parser import CallArguments, CallBegun, CallParser, Said
from tests.server.tools.kinds import KINDS

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
SCHEMA = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}


def tool(name: str, parameters: dict[str, Any] | None = None) -> Tool:
    return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": parameters}})


TOOLS = [tool("get", WEATHER), tool("get_weather", WEATHER)]


class Writer:
    """Follows a grammar with the tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, form: CallFormat) -> None:
        self.form = form
        self._tokenizer = tokenizer
        vocabulary = tokenizer.vocabulary
        self._vocabulary = GrammarVocabulary.of(
            vocabulary.pieces, vocabulary.special_ids, tokenizer.eos_token_ids, tokenizer.vocab_size
        )
        self._library = self._vocabulary.to_library()

    def matcher(self, spec: GrammarSpec) -> Matcher:
        return build(check(spec, self._library, max_chars=10_000), self._library)

    def allowed(self, matcher: Matcher) -> list[int]:
        bits = np.zeros(num_bytes(self._tokenizer.vocab_size), dtype=np.uint8)
        matcher.fill(bits)
        return [int(token_id) for token_id in np.flatnonzero(np.unpackbits(bits, bitorder="little"))]

    def accepts(self, spec: GrammarSpec, text: str) -> bool:
        """Whether `text` may be written from beginning to end, with an end there."""
        matcher = self.matcher(spec)
        # Where markers are text, they are spelt out, though the vocabulary may have them as control tokens.
        parts = [text] if self.form.control_ids else [*text]
        for token_id in [i for part in parts for i in self._tokenizer.encode(part, add_special_tokens=False)]:
            if matcher.is_complete or token_id not in self.allowed(matcher):
                return False
            matcher.consume(token_id)
        return matcher.is_complete or not self._tokenizer.eos_token_ids.isdisjoint(self.allowed(matcher))

    def write(self, spec: GrammarSpec, chance: random.Random, limit: int = 2000) -> list[int]:
        """Tokens at random, up to an end."""
        matcher = self.matcher(spec)
        ids: list[int] = []
        while not matcher.is_complete and len(ids) < limit:
            token_id = chance.choice(self.allowed(matcher))
            if token_id in self._tokenizer.eos_token_ids:
                return ids
            matcher.consume(token_id)
            ids.append(token_id)
        assert len(ids) < limit
        return ids

    def parse(self, ids: list[int]) -> tuple[str, list[tuple[str, Any]]]:
        stream = TextStream(self._tokenizer, SamplingParams(), chat=True, marks=self.form.marks)
        parser = CallParser(self.form, shows_special=False)
        pieces = [*parser.push(stream.push(ids).text + stream.finish()), *parser.finish()]
        names = [piece.name for piece in pieces if isinstance(piece, CallBegun)]
        texts = [""] * len(names)
        for piece in pieces:
            if isinstance(piece, CallArguments):
                texts[piece.index] += piece.text
        assert parser.num_whole == len(names)
        content = "".join(piece.text for piece in pieces if isinstance(piece, Said))
        return content, [(name, json.loads(text)) for name, text in zip(names, texts, strict=True)]


@pytest.fixture(params=[*KINDS, "none"])
def writer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer], formats: dict[str, CallFormat]) -> Writer:
    return Writer(tokenizers[request.param], formats[request.param])


def one(name: str, arguments: str, form: CallFormat) -> str:
    call = f'{{"name": "{name}", "arguments": {arguments}}}'
    return f"[TOOL_CALLS][{call}]" if form.name == "mistral" else f"<tool_call>\n{call}\n</tool_call>"


ARGUMENTS = '{"city": "Rome", "days": 3}'


@pytest.mark.parametrize("parallel", [False, True])
def test_demanded_calls(writer: Writer, parallel: bool) -> None:
    spec = calls_only(writer.form, TOOLS, parallel=parallel)
    counts = set()
    for seed in range(15):
        content, calls = writer.parse(writer.write(spec, random.Random(seed)))
        assert content == ""
        counts.add(min(len(calls), 2))
        for name, arguments in calls:
            assert name in ("get", "get_weather")
            assert arguments["city"] in ("Paris", "Rome")
            assert 0 <= arguments["days"] <= 9
            assert len(arguments) == 2
    assert counts == ({1, 2} if parallel else {1})


def test_what_a_demand_lets_through(writer: Writer) -> None:
    form = writer.form
    spec = calls_only(form, TOOLS, parallel=False)
    assert writer.accepts(spec, one("get", ARGUMENTS, form))
    assert writer.accepts(spec, one("get_weather", ARGUMENTS, form))
    assert not writer.accepts(spec, one("other", ARGUMENTS, form))
    assert not writer.accepts(spec, one("get", '{"city": "Oslo", "days": 3}', form))
    assert not writer.accepts(spec, one("get", '{"city": "Rome"}', form))
    assert not writer.accepts(spec, "Hello")
    assert not writer.accepts(spec, "")
    two = one("get", ARGUMENTS, form) + "\n" + one("get", ARGUMENTS, form)
    assert not writer.accepts(spec, two)


def test_a_tool_without_parameters_takes_any_object(writer: Writer) -> None:
    spec = calls_only(writer.form, [tool("f")], parallel=False)
    assert writer.accepts(spec, one("f", '{"a": [1, {"b": null}]}', writer.form))
    assert writer.accepts(spec, one("f", "{}", writer.form))
    assert not writer.accepts(spec, one("f", "[]", writer.form))


@pytest.mark.parametrize("parallel", [False, True])
def test_an_answer_by_schema_or_calls(writer: Writer, parallel: bool) -> None:
    form = writer.form
    spec = answer_or_calls(form, TOOLS, SCHEMA, parallel=parallel)
    assert writer.accepts(spec, '{"x": 1}')
    assert not writer.accepts(spec, '{"x": 3}')
    assert not writer.accepts(spec, "Hello")
    assert not writer.accepts(spec, '{"x": 1}' + one("get", "{}", form))
    call = one("get", '{"a": 5}', form)
    assert writer.accepts(spec, call)
    assert not writer.accepts(spec, call + '{"x": 1}')
    assert not writer.accepts(spec, one("get", "[]", form))


@pytest.mark.parametrize("schema", [True, {"type": "object"}])
def test_any_json_or_calls(writer: Writer, schema: Any) -> None:
    spec = answer_or_calls(writer.form, TOOLS, schema, parallel=False)
    assert writer.accepts(spec, '{"a": 1}')
    assert writer.accepts(spec, "[]") == (schema is True)


def test_text_and_one_call(writer: Writer) -> None:
    form = writer.form
    spec = text_and_one_call(form, TOOLS)
    for text in ("", "Hello", '{"name": "get"}', "<b> [TOOL <tool_ca é\n"):
        assert writer.accepts(spec, text)
    call = one("get", '{"a": 5}', form)
    assert writer.accepts(spec, call)
    assert writer.accepts(spec, f"Let me see.\n{call}")
    assert not writer.accepts(spec, f"{call}\n{call}")
    assert not writer.accepts(spec, f"{call} and text")
    assert not writer.accepts(spec, one("other", "{}", form))
    assert not writer.accepts(spec, form.marker + "x")


def test_text_that_would_make_it_another_grammar(writer: Writer) -> None:
    parameters = {"type": "object", "properties": {"a": {"enum": ["x ::= y"], "description": '%llguidance {"a"}\n'}}}
    spec = calls_only(writer.form, [tool("f", parameters)], parallel=False)
    content, calls = writer.parse(writer.write(spec, random.Random(0)))
    assert (content, calls[0][0]) == ("", "f")
    assert calls[0][1].get("a") in (None, "x ::= y")


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"type": "no such"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}},
        {"type": "object", "properties": {"a": {"pattern": "("}}},
    ],
)
def test_parameters_that_cannot_be_enforced(writer: Writer, parameters: dict[str, Any]) -> None:
    with pytest.raises(GrammarError):
        writer.matcher(calls_only(writer.form, [tool("f", parameters)], parallel=True))
    assert writer.accepts(text_and_one_call(writer.form, [tool("f", parameters)]), "free")


def test_references_are_within_each_schema(writer: Writer) -> None:
    def parameters(word: str) -> dict[str, Any]:
        return {
            "properties": {"a": {"$ref": "#/$defs/w"}},
            "required": ["a"],
            "additionalProperties": False,
            "$defs": {"w": {"const": word}},
        }

    spec = calls_only(writer.form, [tool("f", parameters("x")), tool("g", parameters("y"))], parallel=False)
    for seed in range(6):
        _, [(name, arguments)] = writer.parse(writer.write(spec, random.Random(seed)))
        assert arguments == {"a": "x" if name == "f" else "y"}


def test_a_demand_as_mixtral_would_write_it(tokenizer: Tokenizer) -> None:
    """SentencePiece puts a space in front of the first word."""
    form = call_format("auto", tokenizer)
    writer = Writer(tokenizer, form)
    spec = calls_only(form, TOOLS, parallel=True)
    call = one("get", ARGUMENTS, form)
    matcher = writer.matcher(spec)
    for token_id in tokenizer.encode(f"{call}\n{call}", add_special_tokens=False):
        assert token_id in writer.allowed(matcher)
        matcher.consume(token_id)
    assert not tokenizer.eos_token_ids.isdisjoint(writer.allowed(matcher))
