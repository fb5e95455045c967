"""Grammars that take for ever."""

from __future__ import annotations

from engine.grammar import GrammarSpec

SLOW = GrammarSpec.json_schema(
    {
        "type": "object",
        "properties": {f"k{number}": {"type": "integer", "multipleOf": 99_991 - 2 * number} for number in range(100)},
    }
)
"""5 KB, and some 40 seconds on a fast machine: an automaton of as many states for each of the numbers."""
