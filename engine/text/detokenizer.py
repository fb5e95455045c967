"""Token ids to text, one at a time, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from types import MappingProxyType

from engine.text.vocabulary import Vocabulary

NO_MARKS: Mapping[int, str] = MappingProxyType({})


class Detokenizer:
    """Incremental decoding of one sequence; O(1) work a token.

    A character is given out with the token that completes it. Bytes that cannot be UTF-8 become U+FFFD, one for each
    maximal invalid part (Unicode 15, section 3.9, table 3-8), as soon as that is certain. The texts given out, joined,
    are the text of all tokens decoded at once.

    A SentencePiece-like vocabulary writes a space before the first word. Of a whole text that space is dropped
    (`drop_leading_space`); of a continuation it is kept, because there it separates words.

    A token of `marks` becomes the text given there, skipped or not, after U+FFFD for a character that it interrupts.
    The characters of those texts come from nothing else: in the text of other tokens they become U+FFFD.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        skip_special_tokens: bool,
        drop_leading_space: bool,
        marks: Mapping[int, str] = NO_MARKS,
    ) -> None:
        self._vocabulary = vocabulary
        self._skipped = vocabulary.special_ids if skip_special_tokens else frozenset()
        self._drop_space = drop_leading_space and vocabulary.drops_leading_space
        self._marks = marks
        self._no_marks = dict.fromkeys(map(ord, "".join(marks.values())), "\ufffd")
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, possibly none."""
        if token_id in self._marks:
            return self.finish() + self._marks[token_id]
        if token_id in self._skipped:
            return ""
        return self._emit(self._decoder.decode(self._vocabulary.token_bytes(token_id)))

    def finish(self) -> str:
        """U+FFFD for a character that was never completed, or nothing."""
        return self._emit(self._decoder.decode(b"", final=True))

    def _emit(self, text: str) -> str:
        if self._no_marks:
            text = text.translate(self._no_marks)
        if text and self._drop_space:
            self._drop_space = False
            return text.removeprefix(" ")
        return text
