"""TextStream: the text of one choice as it is generated, cut at its stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engine.text.detokenizer import NO_MARKS, Detokenizer
from engine.text.tokenizer import Tokenizer
from engine.types import SamplingParams


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one push brought.

    `text` may be sent: no part of it can still belong to a stop string. `stop` is the stop string that was found, if
    one was; nothing follows then. `num_tokens` is how many of the pushed ids were read: all of them or, with a stop
    string, those up to and including the one that completed it.
    """

    text: str
    stop: str | None
    num_tokens: int


class TextStream:
    """Ids in, text out, for one choice.

    The stop string whose last character comes first ends the text, so generation can end at that token whatever may
    follow; of two that end with the same character, the longer. The text is cut where the stop string began, or, with
    `include_stop_str_in_output`, after it. A stop string completed by one of the first `min_tokens` tokens does not
    count. Special tokens that are skipped have no text and match no stop string.

    Text that could be the beginning of a stop string is held back until that is decided. Each character is looked at
    once or twice for each stop string, on average, however long both are.

    With `chat`, the space that a SentencePiece-like vocabulary writes before the first word is dropped; a completion
    keeps it, because it continues a text.

    A token of `marks` is written as the text given there.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        chat: bool = False,
        marks: Mapping[int, str] = NO_MARKS,
    ) -> None:
        self._detokenizer = Detokenizer(
            tokenizer.vocabulary,
            skip_special_tokens=params.skip_special_tokens,
            drop_leading_space=chat,
            marks=marks,
        )
        self._finder = _StopFinder(params.stop) if params.stop else None
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._held = ""
        self._sent = 0  # characters given out, which is also where the held text begins
        self._starts: deque[int] = deque()  # where the text of each token begins that may still be cut off
        self._num_settled = 0  # the tokens before those
        self._stop: str | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the text: all that were pushed or, after a stop string, those that wrote something before the cut.

        Example: "a", " ST", "OP" with stop "STOP": the second wrote the space before the cut, so 2 of 3 count.
        """
        return self._num_settled + len(self._starts)

    @property
    def num_settled(self) -> int:
        """The first so many tokens have begun in the text that was given out: no stop string can cut them off."""
        return self._num_settled

    def push(self, token_ids: Sequence[int], *, stopped: bool = False) -> TextDelta:
        """The text that these tokens bring. After a stop string was found, ids are ignored.

        `stopped` says that the last of them ended the sequence (an end-of-sequence or stop id): its own text is left
        out, unless `include_stop_str_in_output`.
        """
        if self._stop is not None:
            return TextDelta("", self._stop, 0)
        for number, token_id in enumerate(token_ids, start=1):
            silent = stopped and number == len(token_ids) and not self._include_stop
            self._starts.append(self._sent + len(self._held))
            found = self._read("" if silent else self._detokenizer.push(token_id))
            if found is not None:
                self._stop = found
                return TextDelta(self._cut(found), found, number)
        num_partial = 0 if self._finder is None else self._finder.num_partial
        return TextDelta(self._release(len(self._held) - num_partial), None, len(token_ids))

    def finish(self) -> str:
        """The text still held back, at the end of a sequence that no stop string ended.

        A character that was never completed is U+FFFD; that one is not searched for stop strings.
        """
        if self._stop is not None:
            return ""
        self._held += self._detokenizer.finish()
        return self._release(len(self._held))

    def _read(self, text: str) -> str | None:
        """Hold `text`, up to the end of the first stop string in it, which is returned."""
        if self._finder is None:
            self._held += text
            return None
        for index, char in enumerate(text):
            found = self._finder.feed(char)
            if found is not None and self.num_tokens > self._min_tokens:
                self._held += text[: index + 1]
                return found
        self._held += text
        return None

    def _cut(self, stop: str) -> str:
        """Give out the text before `stop`, with which the held text ends, and forget the tokens after it."""
        kept = len(self._held) if self._include_stop else len(self._held) - len(stop)
        while self._starts and self._starts[-1] >= self._sent + kept:
            self._starts.pop()
        return self._release(kept)

    def _release(self, num_chars: int) -> str:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        self._sent += num_chars
        while self._starts and self._starts[0] < self._sent:
            self._starts.popleft()
            self._num_settled += 1
        return text


class _StopFinder:
    """Searches a stream for several strings, character by character.

    Knuth, Morris and Pratt (1977), once a string: `states[i]` is the length of the longest proper or whole beginning of
    string i that the stream ends with, and `borders[i][n]` that of the longest beginning of string i that its first n
    characters end with, other than all n. Example: "abab" has borders [0, 0, 0, 1, 2]: after "aba" a "c" rules out
    length 3 and leaves "a" (length 1) to try, then nothing.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._borders = [_borders(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)

    @property
    def num_partial(self) -> int:
        """How many of the last characters could be the beginning of a stop string."""
        return max(self._states, default=0)

    def feed(self, char: str) -> str | None:
        """The longest stop string that ends with this character."""
        found: str | None = None
        for index, stop in enumerate(self._stops):
            borders, state = self._borders[index], self._states[index]
            while state and stop[state] != char:
                state = borders[state]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                state = borders[state]
                if found is None or len(stop) > len(found):
                    found = stop
            self._states[index] = state
        return found


def _borders(text: str) -> list[int]:
    borders = [0, 0]
    for char in text[1:]:
        border = borders[-1]
        while border and text[border] != char:
            border = borders[border]
        borders.append(border + 1 if text[border] == char else 0)
    return borders
