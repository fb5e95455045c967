"""The shortest text that is valid under a JSON schema: whether, and how soon, an answer could end.

llguidance refuses a schema that nothing satisfies, but one whose every instance is endless it would follow for ever.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

_MANY = 1e15
"""A larger count counts as this one."""


def shortest(schema: Any) -> float:
    """A lower bound of the characters of an instance; infinite when no instance is finite.

    The least fixed point of the equations below: all schemas start as endless, and each round lets in what ends by way
    of what is known to end. Example: {"a": A} with A = {"next": A or null} is bounded through null in the first
    round, {"next": A} in none. Keywords that are not looked at count as no demand.

    It is reached in as many rounds as there are references: what is shortest does not come back to itself.
    """
    lengths = _Lengths(schema)
    while lengths.improve():
        pass
    return lengths.of(schema)


class _Lengths:
    """What is known of the schema's references, the only places where it can come back to itself."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._targets: dict[str, float] = {}
        self._found: list[str] = []
        self.of(root)
        for reference in self._found:  # which grows
            self.of(self._resolve(reference))

    def improve(self) -> bool:
        """Compute every reference once more, the last found first; whether any became shorter."""
        before = dict(self._targets)
        for reference in reversed(self._found):
            self._targets[reference] = self.of(self._resolve(reference))
        return self._targets != before

    def of(self, schema: Any) -> float:
        if not isinstance(schema, Mapping):
            return 1
        if "const" in schema or "enum" in schema:
            return 1
        demands = [self._by_type(schema)]
        if isinstance(reference := schema.get("$ref"), str):
            if reference not in self._targets:
                self._targets[reference] = math.inf
                self._found.append(reference)
            demands.append(self._targets[reference])
        demands += [self.of(item) for item in _schemas(schema.get("allOf"))]
        for name in ("anyOf", "oneOf"):
            if options := _schemas(schema.get(name)):
                demands.append(min(map(self.of, options)))
        return max(demands)

    def _by_type(self, schema: Mapping[str, Any]) -> float:
        """Of the cheapest type that is allowed. Where no type is named, anything that is short will do."""
        types = schema.get("type")
        names = _texts(types) if isinstance(types, list) else {types if isinstance(types, str) else ""}
        return min((self._of_type(name, schema) for name in names), default=1)

    def _of_type(self, name: str, schema: Mapping[str, Any]) -> float:
        match name:
            case "object":
                properties = schema.get("properties")
                known = properties if isinstance(properties, Mapping) else {}
                names = _texts(schema.get("required"))
                return 2 + sum(len(key) + 3 + self.of(known.get(key)) for key in names) + max(0, len(names) - 1)
            case "array":
                count = _count(schema.get("minItems"))
                first = _schemas(schema.get("prefixItems"))[: int(count)]
                rest = count - len(first)
                others = rest * self.of(schema.get("items")) if rest else 0
                return 2 + sum(map(self.of, first)) + others + max(0, count - 1)
            case "string":
                return 2 + _count(schema.get("minLength"))
        return 1

    def _resolve(self, reference: str) -> Any:
        """What a reference into this document names; anything else is llguidance's to refuse."""
        if reference != "#" and not reference.startswith("#/"):
            return None
        found = self._root
        for part in unquote(reference).split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, Mapping):
                found = found.get(key)
            elif isinstance(found, list) and re.fullmatch(r"[0-9]{1,9}", key) and int(key) < len(found):
                found = found[int(key)]
            else:
                return None
        return found


def _schemas(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _texts(value: Any) -> set[str]:
    return {item for item in value if isinstance(item, str)} if isinstance(value, list) else set()


def _count(value: Any) -> float:
    return min(value, _MANY) if isinstance(value, int | float) and value > 0 else 0
