"""Answers with calls: what the fake engine writes, and what a client makes of the chunks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
OTHER = {"type": "function", "function": {"name": "time"}}
USER = {"role": "user", "content": "How warm is it?"}
ASK: dict[str, Any] = {"messages": [USER], "tools": [TOOL, OTHER]}
PARIS = '{"city": "Paris"}'


def written(form: str, *calls: tuple[str, str]) -> str:
    objects = [f'{{"name": "{name}", "arguments": {text}}}' for name, text in calls]
    if form.startswith("mistral"):
        return f"[TOOL_CALLS][{', '.join(objects)}]"
    return "\n".join(f"<tool_call>\n{item}\n</tool_call>" for item in objects)


def joined(chunks: Sequence[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], str | None]:
    """The message that a client puts together, without its calls' ids, and the finish_reason."""
    message: dict[str, Any] = {}
    reason = None
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        assert reason is None, "nothing comes after the end"
        reason = choice["finish_reason"]
        delta = choice["delta"]
        assert delta or reason
        if "role" in delta:
            assert message == {}
            message = {"role": delta["role"], "content": delta["content"]}
        elif "content" in delta:
            assert delta["content"]
            message["content"] = (message["content"] or "") + delta["content"]
        for part in delta.get("tool_calls", ()):
            calls = message.setdefault("tool_calls", [])
            if "id" in part:
                assert part["index"] == len(calls)
                assert part["function"].keys() == {"name", "arguments"}
                assert part["function"]["arguments"] == ""
                calls.append({"type": part["type"], "function": dict(part["function"])})
            else:
                assert part.keys() == {"index", "function"}
                assert part["function"]["arguments"]
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    return message, reason


def without_ids(choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The same of a whole answer."""
    message = dict(choice["message"])
    assert message.pop("refusal") is None
    if "tool_calls" in message:
        message["tool_calls"] = [{**call} for call in message["tool_calls"]]
        ids = {call.pop("id") for call in message["tool_calls"]}
        assert len(ids) == len(message["tool_calls"]) > 0
    return message, choice["finish_reason"]


def call(name: str, text: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": text}}
