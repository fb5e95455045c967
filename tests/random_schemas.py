"""Random JSON schemas: nested objects, enums, bounded arrays, numbers, strings, patterns, references, recursion."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_TEXTS = ('say "hi"', "back\\slash", "новый", "日本", "😀", "a/b", "tab\there", "", "x\x7fy", "null", "ключ и замок")
_NAMES = ("id", "name", "größe", "a b", 'q"uote', "x/y", "ταυ", "n1", "_", "value", "sub\\item", "😀")
_PATTERNS = (
    r"^[a-z]{2,6}$",
    r"^[A-Z][a-z]{1,4}(-[0-9]{2})?$",
    r"^(red|green|blue)( (red|green|blue)){0,2}$",
    r"^\d{3}-\d{4}$",
    r"^[^a-z]{1,3}$",
)


@dataclass(frozen=True)
class RandomSchema:
    """`bounded`: no instance is endless, however a model goes about it."""

    name: str
    schema: dict[str, Any]
    bounded: bool


def random_schema(seed: int) -> RandomSchema:
    """The same for the same seed."""
    maker = _Maker(random.Random(seed))
    schema = maker.root()
    return RandomSchema(f"schema {seed}", schema, maker.bounded)


class _Maker:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._defs: dict[str, Any] = {}
        self.bounded = True

    def root(self) -> dict[str, Any]:
        make = self._rng.choice([self._object, self._object, self._array, self._recursive, self._choice])
        schema = make(2)
        if not self._defs:
            return schema
        if "$ref" in schema and self._rng.random() < 0.5:
            schema = {"type": "array", "items": schema, "maxItems": 2}
        return {"$defs": self._defs, **schema}

    def _any(self, depth: int) -> dict[str, Any]:
        plain: list[Callable[[], dict[str, Any]]] = [
            *(self._integer, self._integer, self._number, self._string, self._pattern),
            *(self._enum, self._const, self._plain),
        ]
        nested = [self._object, self._array, self._tuple, self._choice, self._reference, self._recursive]
        if depth > 0 and self._rng.random() < 0.5:
            return self._rng.choice(nested)(depth - 1)
        return self._rng.choice(plain)()

    def _integer(self) -> dict[str, Any]:
        low = self._rng.choice([0, 1, -5, -1000, 99, 10**6])
        high = low + self._rng.choice([0, 1, 9, 255, 10**9])
        schema: dict[str, Any] = {"type": "integer", "minimum": low, "maximum": high}
        if self._rng.random() < 0.2:
            schema["multipleOf"] = self._rng.choice([1, 2, 5])
            schema["maximum"] = high + 10
        if self._rng.random() < 0.15:
            del schema["maximum"]
            self.bounded = False
        return schema

    def _number(self) -> dict[str, Any]:
        """With as many digits after the point as a model likes."""
        self.bounded = False
        low = self._rng.choice([-1.75, 0, 0.25, 100])
        schema: dict[str, Any] = {"type": "number", "minimum": low}
        if self._rng.random() < 0.8:
            schema[self._rng.choice(["maximum", "exclusiveMaximum"])] = low + self._rng.choice([0.5, 1, 1000])
        return schema

    def _string(self) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string", "maxLength": self._rng.choice([0, 1, 3, 12])}
        if self._rng.random() < 0.5:
            schema["minLength"] = self._rng.randint(0, schema["maxLength"])
        if self._rng.random() < 0.1:
            del schema["maxLength"]
            self.bounded = False
        return schema

    def _pattern(self) -> dict[str, Any]:
        return {"type": "string", "pattern": self._rng.choice(_PATTERNS)}

    def _enum(self) -> dict[str, Any]:
        values = [*self._rng.sample(_TEXTS, 3), 7, -2.5, None, True]
        return {"enum": self._rng.sample(values, self._rng.randint(1, 5))}

    def _const(self) -> dict[str, Any]:
        return {"const": self._rng.choice([*_TEXTS, 0, -12, 2.5, None, False, [1, "two"], {"k": [None]}])}

    def _plain(self) -> dict[str, Any]:
        return {"type": self._rng.choice(["boolean", "null", ["boolean", "null"]])}

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._rng.sample(_NAMES, self._rng.randint(1, 4))
        schema: dict[str, Any] = {
            "type": "object",
            "properties": {name: self._any(depth) for name in names},
            "required": [name for name in names if self._rng.random() < 0.6],
            "additionalProperties": False,
        }
        if self._rng.random() < 0.1:
            schema["additionalProperties"] = self._integer()
            self.bounded = False
        return schema

    def _array(self, depth: int) -> dict[str, Any]:
        most = self._rng.randint(1, 3)
        return {"type": "array", "items": self._any(depth), "minItems": self._rng.randint(0, most), "maxItems": most}

    def _tuple(self, depth: int) -> dict[str, Any]:
        items = [self._any(depth) for _ in range(self._rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def _choice(self, depth: int) -> dict[str, Any]:
        if self._rng.random() < 0.3:
            return {"oneOf": [self._tagged(tag, depth) for tag in ("circle", "square")]}
        return {"anyOf": [self._any(depth) for _ in range(self._rng.randint(2, 3))]}

    def _tagged(self, tag: str, depth: int) -> dict[str, Any]:
        properties = {"kind": {"const": tag}, "size": self._any(depth)}
        return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}

    def _reference(self, depth: int) -> dict[str, Any]:
        name = self._new("part/~")
        self._defs[name] = self._any(depth)
        return _reference_to(name)

    def _recursive(self, depth: int) -> dict[str, Any]:
        """A list or a tree, which may end after any node."""
        self.bounded = False
        name = self._new("node ")
        own = _reference_to(name)
        children: dict[str, Any] = {"anyOf": [own, {"type": "null"}]}
        if self._rng.random() < 0.4:
            children = {"type": "array", "items": own, "maxItems": 2}
        required = ["v", "next"] if self._rng.random() < 0.5 else ["v"]
        node = {"type": "object", "properties": {"v": self._any(depth - 1), "next": children}, "required": required}
        self._defs[name] = node | {"additionalProperties": False}
        return own

    def _new(self, stem: str) -> str:
        name = f"{stem}{len(self._defs)}"
        self._defs[name] = {}
        return name


def _reference_to(name: str) -> dict[str, Any]:
    return {"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1").replace(" ", "%20")}
