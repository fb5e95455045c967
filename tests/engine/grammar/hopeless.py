"""Grammars that take for ever."""

from __future__ import annotations

from engine.grammar import GrammarSpec

SLOW = GrammarSpec.json_schema({"type": "object", "properties": {f"k{number}": {} for number in range(16_000)}})
"""12 seconds on a fast machine: for each property, all that may come after it. It is refused in the end."""
