"""GrammarStore: the engine's built grammars, so that each is built once and kept while it is used."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from engine.grammar.build import build
from engine.grammar.matcher import Matcher
from engine.grammar.vocabulary import GrammarVocabulary

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_GRAMMARS = 64
"""Built grammars that are kept; the least recently used goes first."""


class GrammarStore:
    """Builds in a thread of its own, without holding up steps: llguidance lets other threads run. Used from one
    thread."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self.eos_token_ids = frozenset(vocabulary.eos_token_ids)
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._built: OrderedDict[bytes, Future[Matcher]] = OrderedDict()

    def get(self, source: str) -> Future[Matcher]:
        """The grammar at its beginning, to be copied; done at once when it is known. It may have a GrammarError."""
        key = _key(source)
        future = self._built.get(key)
        if future is None:
            future = self._built[key] = self._builder.submit(self._build, source)
            if len(self._built) > MAX_GRAMMARS:
                self._built.popitem(last=False)
        self._built.move_to_end(key)
        return future

    def forget(self, source: str) -> None:
        """Build the grammar anew when it is asked for next: copies share what they learned of it, and there is a bound
        to that, over which none of them can be followed further."""
        self._built.pop(_key(source), None)

    def _build(self, source: str) -> Matcher:
        if self._tokenizer is None:
            self._tokenizer = self._vocabulary.to_library()
        return build(source, self._tokenizer)


def _key(source: str) -> bytes:
    return hashlib.sha256(source.encode()).digest()
