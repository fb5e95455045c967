"""Chat templates: messages to the text of a prompt, in a Jinja sandbox configured as transformers configures its own.

Templates come from the operator or the checkpoint, never from a request. They are still not trusted: they run without
access to Python's internals, cannot change what they are given, and what they write, how far their ranges go and how
large a product, power or formatted text may be is bounded. What they cost within those bounds is not: whoever serves a
checkpoint runs its template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.text.errors import TemplateError

MAX_OUTPUT_CHARS = 16_000_000
MAX_RANGE_STEPS = 1_000_000
_MAX_MESSAGE_CHARS = 500


class ChatTemplate:
    """A compiled template. `variables` are what it may name beside the messages: bos_token, eos_token, …

    Raises TemplateError when `source` is not a template.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[LoopControlExtension, _GenerationBlock]
        )
        environment.filters["tojson"] = _tojson
        environment.filters["format"] = _format
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"line {error.lineno}: {_one_line(error.message or '')}") from None
        except RecursionError:
            raise TemplateError("nested too deeply") from None
        self.source = source
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool,
    ) -> str:
        """The prompt's text.

        Raises TemplateError when the template refuses the messages, fails, or writes or loops too much.
        """
        parts: list[str] = []
        num_chars = 0
        try:
            for part in self._template.generate(
                **self._variables,
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                range=_bounded_range(),
            ):
                parts.append(part)
                num_chars += len(part)
                if num_chars > MAX_OUTPUT_CHARS:
                    raise TemplateError(f"the chat template wrote more than {MAX_OUTPUT_CHARS:,} characters")
        except TemplateError:
            raise
        except Exception as error:  # whatever its expressions raise: a template is a program of someone else
            raise TemplateError(f"the chat template failed: {_one_line(str(error) or type(error).__name__)}") from error
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """Refuses the operators that make something huge of something small, before they do."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "%" and isinstance(left, str):
            return _format(left, *(right if isinstance(right, tuple) else (right,)))
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                    _check_size(len(repeated) * times)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            _check_size(bits // 8)
        return super().call_binop(context, operator, left, right)


def _format(text: str, *values: Any) -> str:
    """`text % values` without widths that nobody needs."""
    if re.search(r"\d{5}", text) or "*" in text:
        raise TemplateError("the chat template formats with a width or precision that is too large")
    return text % values


def _check_size(size: int) -> None:
    if size > MAX_OUTPUT_CHARS:
        raise TemplateError(f"the chat template makes a value of more than {MAX_OUTPUT_CHARS:,} characters")


class _GenerationBlock(Extension):
    """`{% generation %}` … `{% endgeneration %}` marks words to train on; only what is inside counts here."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares an instance attribute)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _bounded_range() -> Callable[..., range]:
    """`range` for one rendering, all of whose ranges together have at most MAX_RANGE_STEPS steps."""
    left = MAX_RANGE_STEPS

    def bounded(*args: int) -> range:
        nonlocal left
        steps = range(*args)
        left -= len(steps)
        if left < 0:
            raise TemplateError(f"the chat template loops over more than {MAX_RANGE_STEPS:,} numbers")
        return steps

    return bounded


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where Jinja's own filter escapes <, >, & and ' for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(_one_line(str(message)))


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _one_line(message: str) -> str:
    return " ".join(message.split())[:_MAX_MESSAGE_CHARS]
