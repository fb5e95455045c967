"""What an answer must match: OpenAI's response_format and vLLM's structured_outputs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from engine.grammar import GrammarSpec
from server.errors import BadRequestError
from server.json_io import parse
from server.protocol import fields
from server.protocol.fields import absent


class TextFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["text"]


class JsonObjectFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["json_object"]


class NamedSchema(BaseModel):
    """`strict` makes no difference: every schema is enforced."""

    model_config = ConfigDict(strict=True)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | bool, Field(alias="schema")]
    strict: bool | None = None


class JsonSchemaFormat(BaseModel):
    model_config = ConfigDict(strict=True)

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")],
    fields.expect(
        '{"type": "text"}, {"type": "json_object"} or {"type": "json_schema", "json_schema": {"name": "…", "schema": '
        "{…}}}, with a name of 1 to 64 letters, digits, _ and -"
    ),
]
_Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, fail_fast=True)]
_KINDS = frozenset({"json", "regex", "choice", "grammar"})


class StructuredOutputs(BaseModel):
    """Exactly one of its fields."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_schema: Annotated[dict[str, Any] | bool | str, fields.expect("a JSON schema, or the text of one")] | None = (
        Field(None, alias="json", description="A JSON schema, or the text of one.")
    )
    regex: fields.Text | None = absent("A regular expression in the syntax of Rust's regex crate; all of it matches.")
    choice: Annotated[_Choices, fields.expect("a list of texts, none empty")] | None = absent("One of these texts.")
    grammar: fields.Text | None = absent("A grammar: llguidance's dialect of Lark, or GBNF.")

    @model_validator(mode="before")
    @classmethod
    def _no_other(cls, given: Any) -> Any:
        """One error for all unknown keys, where pydantic has one for each."""
        if isinstance(given, dict) and not given.keys() <= _KINDS:
            raise PydanticCustomError("expected", "must have json, regex, choice or grammar, and nothing else")
        return given

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_schema, self.regex, self.choice, self.grammar)) != 1:
            raise BadRequestError(
                "structured_outputs must have exactly one of json, regex, choice, grammar.", param="structured_outputs"
            )
        return self

    def to_spec(self) -> GrammarSpec:
        """Raises BadRequestError when the text of a schema is none."""
        if self.regex is not None:
            return GrammarSpec.regex(self.regex)
        if self.choice is not None:
            return GrammarSpec.choice(self.choice)
        if self.grammar is not None:
            return GrammarSpec.lark(self.grammar)
        schema = self.json_schema
        if isinstance(schema, str):
            schema = _parse_schema(schema)
        assert schema is not None, "one of the four is there"
        return GrammarSpec.json_schema(schema)


def format_spec(response_format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None) -> GrammarSpec | None:
    """None for text, which may be anything."""
    match response_format:
        case JsonObjectFormat():
            return GrammarSpec.json_object()
        case JsonSchemaFormat(json_schema=named):
            return GrammarSpec.json_schema(named.json_schema)
    return None


def _parse_schema(text: str) -> dict[str, Any] | bool:
    try:
        schema = parse(text.encode())
    except ValueError as error:
        raise BadRequestError(f"structured_outputs.json is not JSON: {error}.", param="structured_outputs") from None
    if not isinstance(schema, dict | bool):
        raise BadRequestError("structured_outputs.json must be a JSON schema.", param="structured_outputs")
    return schema
