"""Answers that must match a grammar: JSON schemas, regular expressions, choices and context-free grammars.

    spec        what a caller asks for, and its text in the one grammar language that llguidance reads
    schema      whether a JSON schema can end at all
    build       text -> llguidance's matcher, within limits of time and memory
    checker     the same in a process that can be killed, for texts of strangers
    store       the engine's bounded cache of built grammars
    matcher     one sequence's place in its grammar: which tokens may follow

Derivatives of the grammar are taken as the tokens come, instead of a table for all states in advance: llguidance,
https://github.com/guidance-ai/llguidance.
"""

from engine.grammar.errors import GrammarError
from engine.grammar.matcher import Matcher
from engine.grammar.spec import GrammarSpec
from engine.grammar.vocabulary import GrammarVocabulary

__all__ = ["GrammarError", "GrammarSpec", "GrammarVocabulary", "Matcher"]
