"""Tools in a chat: what a template writes of them itself, and the words that say it where it writes nothing.

A tool is {"type": "function", "function": {"name", "description", "parameters"}}; an assistant's message has
`tool_calls`, each {"id", "type", "function": {"name", "arguments": an object}}; a tool's answer is a message of role
`tool` with `tool_call_id`. That is what transformers hands to templates.

Where a template has no place for tools, a preamble in the Hermes format describes them: in the system message or, where
the template knows none, before the first user message. Where it has no place for calls and answers, calls are text of
the assistant's turn, and the answers to them one user turn, together with a user message that follows. So the roles
alternate even for templates that insist on it. These words are text as any user's: they can be forged.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.text.errors import TemplateError
from engine.text.template import ChatTemplate

ToolFormat = Literal["mistral", "hermes"]
"""How a model writes its calls: `[TOOL_CALLS][{"name", "arguments"}]`, or JSON within <tool_call></tool_call>."""
Messages = Sequence[Mapping[str, Any]]

MARKERS = frozenset(f"<{slash}{name}>" for slash in ("", "/") for name in ("tools", "tool_call", "tool_response"))
"""Added tokens of these names are control in a template with tools, whether a vocabulary flags them so or not."""

_SHORT_ID = re.compile(r"[A-Za-z0-9]{9}")
_PREAMBLE = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""

_CALL_FORM = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": {...}}}'

_QUESTION = {"role": "user", "content": "7f3a q"}
_TOOL = {
    "type": "function",
    "function": {
        "name": "f_7f3a",
        "description": "7f3a d",
        "parameters": {
            "type": "object",
            "properties": {"p_7f3a": {"type": "string", "description": "7f3a p"}},
            "required": ["p_7f3a"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class ToolSupport:
    """What one template does by itself, found by rendering short chats."""

    tools: bool
    """It describes the tools."""
    turns: bool
    """It writes calls and the answers to them."""
    short_ids: bool
    """It refuses ids of calls other than nine letters and digits, as Mistral's do."""
    system: bool
    """It writes a system message."""

    @classmethod
    def of(cls, template: ChatTemplate, *, with_tools: bool) -> ToolSupport:
        """Of chats with tools, or of those without, which may still hold calls from before."""
        tools = [_TOOL] if with_tools else None
        nine = _writes(template, _called("7f3a7f3a7"), tools, "f_7f3a", "7f3a v", "7f3a r")
        return cls(
            tools=_writes(template, [_QUESTION], [_TOOL], "f_7f3a"),
            turns=nine,
            short_ids=nine and not _writes(template, _called("call_7f3a7f3a7f3a7f3a"), tools, "7f3a r"),
            system=_writes(template, [{"role": "system", "content": "7f3a s"}, _QUESTION], None, "7f3a s"),
        )

    def prepare(self, messages: Messages, tools: Messages | None) -> tuple[Messages, Messages | None]:
        """The chat in a form that the template can write, with the same meaning."""
        if not self.turns:
            messages = _turns_as_text(messages)
        elif self.short_ids:
            messages = _with_short_ids(messages)
        if tools and not self.tools:
            return self._with_preamble(messages, tools), None
        return messages, tools or None

    def _with_preamble(self, messages: Messages, tools: Messages) -> Messages:
        preamble = _PREAMBLE.format(tools="\n".join(map(_dump, tools)))
        first = messages[0] if messages else {}
        if first.get("role") == "system":
            return [{**first, "content": f"{first.get('content')}\n\n{preamble}"}, *messages[1:]]
        if self.system:
            return [{"role": "system", "content": preamble}, *messages]
        if first.get("role") == "user":
            return [{**first, "content": f"{preamble}\n\n{first.get('content')}"}, *messages[1:]]
        return [{"role": "user", "content": preamble}, *messages]


def check_calls(message: Mapping[str, Any], where: str) -> None:
    """Raise TemplateError unless the message's calls, if any, have the form that the module's text tells."""
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list | tuple) or not all(map(_is_call, calls)):
        raise TemplateError(f"{where}.tool_calls must be a list of {_CALL_FORM}")
    if message.get("role") == "tool" and not isinstance(message.get("tool_call_id", ""), str):
        raise TemplateError(f"{where}.tool_call_id must be a string")


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, Mapping) else None
    return (
        isinstance(function, Mapping) and isinstance(call.get("id"), str) and {"name", "arguments"} <= function.keys()
    )


def _called(call_id: str) -> Messages:
    """A short chat with a call and its answer."""
    call = {"id": call_id, "type": "function", "function": {"name": "f_7f3a", "arguments": {"p_7f3a": "7f3a v"}}}
    return [
        _QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f_7f3a", "tool_call_id": call_id, "content": "7f3a r"},
    ]


def _writes(template: ChatTemplate, messages: Messages, tools: Messages | None, *words: str) -> bool:
    try:
        text = template.render(messages, tools=tools, add_generation_prompt=True)
    except TemplateError:
        return False
    return all(word in text for word in words)


def _turns_as_text(messages: Messages) -> Messages:
    """Calls as text of the assistant's turn; answers, and a user message right after them, as one user turn."""
    turns: list[Mapping[str, Any]] = []
    answers: list[str] = []  # of a turn that is still open
    for message in messages:
        if message.get("role") == "tool":
            answers.append(f"<tool_response>\n{message.get('content')}\n</tool_response>")
            continue
        if answers and message.get("role") == "user":
            message = {"role": "user", "content": "\n".join([*answers, str(message.get("content"))])}
        elif answers:
            turns.append({"role": "user", "content": "\n".join(answers)})
        answers = []
        turns.append(_calls_as_text(message) if message.get("tool_calls") else message)
    if answers:
        turns.append({"role": "user", "content": "\n".join(answers)})
    return turns


def _calls_as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    parts = [str(content)] if content else []
    for call in message["tool_calls"]:
        function = call["function"]
        text = _dump({"name": function["name"], "arguments": function["arguments"]})
        parts.append(f"<tool_call>\n{text}\n</tool_call>")
    return {"role": message["role"], "content": "\n".join(parts)}


def _with_short_ids(messages: Messages) -> Messages:
    """An id that is not of the template's form is replaced, the same one always by the same."""
    return [_message_with_short_ids(message) for message in messages]


def _message_with_short_ids(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if calls := message.get("tool_calls"):
        return {**message, "tool_calls": [{**call, "id": _short_id(call["id"])} for call in calls]}
    if message.get("role") == "tool" and "tool_call_id" in message:
        return {**message, "tool_call_id": _short_id(message["tool_call_id"])}
    return message


def _short_id(call_id: str) -> str:
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    return hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
