"""Tools: those a request offers, the calls in its messages, and the calls in answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict

from server.errors import BadRequestError
from server.json_io import parse
from server.protocol import fields
from server.protocol.fields import absent

MAX_TOOLS = 128
MAX_CALLS = 128
"""In one message."""
FUNCTION_NAME = r"^[A-Za-z0-9_-]{1,64}$"

FunctionName = Annotated[
    str, Field(pattern=FUNCTION_NAME), fields.expect("a string of 1 to 64 letters, digits, _ and -")
]
FunctionType = Annotated[Literal["function"], fields.expect('"function"')]


class Function(BaseModel):
    model_config = ConfigDict(strict=True)

    name: FunctionName
    description: fields.Text | None = absent("For the model.")
    parameters: Annotated[dict[str, Any], fields.expect("a JSON schema, as an object")] | None = absent(
        "A JSON schema of type object; without one, any object."
    )
    strict: fields.Flag | None = absent("No effect: the schema is enforced where tool_choice demands a call.", False)


class Tool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: FunctionType
    function: Function

    def to_template(self) -> dict[str, Any]:
        """As templates expect it: they read every one of these keys."""
        function = self.function
        parameters = function.parameters or {"type": "object", "properties": {}}
        return {
            "type": "function",
            "function": {
                "name": function.name,
                "description": function.description or "",
                "parameters": parameters,
            },
        }


class FunctionChoice(BaseModel):
    model_config = ConfigDict(strict=True)

    name: FunctionName


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True)

    type: FunctionType
    function: FunctionChoice


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | NamedTool,
    fields.expect('none, auto, required or {"type": "function", "function": {"name": "..."}}'),
]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True), fields.at_most(MAX_TOOLS)]


class GivenFunction(BaseModel):
    model_config = ConfigDict(strict=True)

    name: FunctionName
    arguments: Annotated[fields.Text, Field(description="The text of a JSON object.")]


class GivenCall(BaseModel):
    """A call in an assistant's message, as an answer had it."""

    model_config = ConfigDict(strict=True)

    id: Annotated[str, Field(min_length=1), fields.expect("a non-empty string")]
    type: FunctionType
    function: GivenFunction

    def to_template(self, where: str) -> dict[str, Any]:
        """As templates expect it, with arguments as an object. Raises BadRequestError when they are none."""
        try:
            arguments = parse(self.function.arguments.encode())
        except ValueError:
            arguments = None
        if not isinstance(arguments, dict):
            raise BadRequestError(f"{where}.function.arguments must be the text of a JSON object.", param="messages")
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.function.name, "arguments": arguments},
        }


GivenCalls = Annotated[list[GivenCall], Field(max_length=MAX_CALLS, fail_fast=True), fields.at_most(MAX_CALLS)]


def check_tools(tools: list[Tool], choice: Literal["none", "auto", "required"] | NamedTool | None) -> None:
    """Raises BadRequestError unless the tools have names of their own and `choice` can be met."""
    names: set[str] = set()
    for index, tool in enumerate(tools):
        function = tool.function
        if function.name in names:
            raise BadRequestError(f"tools[{index}].function.name is taken: {function.name}.", param="tools")
        names.add(function.name)
        if (function.parameters or {}).get("type", "object") != "object":
            raise BadRequestError(
                f"tools[{index}].function.parameters must be a JSON schema of type object.", param="tools"
            )
    if choice not in (None, "none", "auto") and not tools:
        raise BadRequestError("tool_choice must be none or auto when there are no tools.", param="tool_choice")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise BadRequestError(f"tool_choice names {choice.function.name}, which is no tool.", param="tool_choice")


class FunctionCall(TypedDict):
    name: str
    arguments: Annotated[
        str, Field(description="JSON, as the model wrote it; where the answer was cut off, a beginning of JSON.")
    ]


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class FunctionDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The first of a call has its id, type and name; those after it, more of its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta
