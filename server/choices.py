"""Token events to the text of one choice: the same for both endpoints, streamed or not."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from engine.errors import RequestFailedError
from engine.text import NO_MARKS, Detokenizer, TextStream, Tokenizer, stop_reason
from engine.types import ExpertVisits, FinishReason, SamplingParams, TokenEvent, TokenLogprobs
from server.protocol.routing import TokenTrace
from server.routing import token_trace

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log probability (None for the first of a prompt) and the likeliest ones at its place.

    `offset` is where its text begins, in characters of the choice's whole text; a token that continues a character
    has the offset of that character.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """The next piece of one choice. Only the last has a `finish_reason`, and it has no text."""

    index: int
    text: str = ""
    tokens: tuple[ScoredToken, ...] = ()
    """The tokens that this text comes from, when log probabilities were asked for."""
    finish_reason: Literal["stop", "length"] | None = None
    routing: tuple[TokenTrace, ...] = ()
    """The routing of those tokens, when that was asked for; at the end that of the end-of-sequence token too."""
    prompt_routing: tuple[TokenTrace, ...] | None = None
    """In the first delta of a choice, when it was asked for."""


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt that is given back in front of the choice's own text."""

    text: str
    prompt_ids: tuple[int, ...]


class Choice:
    """Turns the events of one sequence into deltas.

    A token is listed in the delta that brings the first of its text, so one that a stop string cuts off is not listed.
    The end-of-sequence token (or stop id) is counted in `num_tokens` and has a routing like any other, but no score.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        chat: bool,
        echo: Echo | None = None,
        marks: Mapping[int, str] = NO_MARKS,
    ) -> None:
        """`marks`: texts for some tokens in place of their own."""
        self.index = index
        self.finish_reason: Literal["stop", "length"] | None = None
        self.num_cached_tokens = 0
        self.expert_visits: ExpertVisits | None = None
        self._tokenizer = tokenizer
        self._params = params
        self._echo = echo
        self._text = TextStream(tokenizer, params, chat=chat, marks=marks)
        self._locator = TokenLocator(tokenizer, params, drop_leading_space=chat, base=len(echo.text) if echo else 0)
        self._scores = Pending[ScoredToken]()
        self._routing = Pending[TokenTrace]()
        self._prompt_routing: tuple[TokenTrace, ...] | None = None
        self._prompt_tokens: tuple[ScoredToken, ...] = ()
        self._started = False
        self._sum_logprobs = 0.0
        self._num_scored = 0

    @property
    def mean_logprob(self) -> float:
        """Over all tokens that were read; 0 when no log probabilities were asked for."""
        return self._sum_logprobs / max(1, self._num_scored)

    @property
    def num_tokens(self) -> int:
        """Generated tokens, the end-of-sequence token too; up to the cut when a stop string ended the text."""
        return self._text.num_tokens

    def push(self, event: TokenEvent) -> list[ChoiceDelta]:
        """The deltas that `event` brings: none, text, the finish, or both. Nothing may be pushed after a finish.

        Raises RequestFailedError when the event says so.
        """
        assert self.finish_reason is None, "the choice is finished"
        if event.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            raise RequestFailedError(event.error or "the request was aborted")
        deltas = [] if self._started else self._start(event)
        self.expert_visits = event.expert_visits or self.expert_visits
        read = self._text.push(event.token_ids, stopped=event.finish_reason is FinishReason.STOP)
        if event.logprobs is not None:
            self._sum_logprobs += sum(entry.logprob for entry in event.logprobs[: read.num_tokens])
            self._num_scored += read.num_tokens
            self._scores.push(map(self._locator.locate, event.logprobs[: self._num_listed(event, read.num_tokens)]))
        if event.routing is not None:
            self._routing.push(map(token_trace, event.routing[: read.num_tokens]))
        text = read.text
        if read.stop is not None:
            self.finish_reason = "stop"
        elif event.finish_reason is not None:
            self.finish_reason = "length" if event.finish_reason is FinishReason.LENGTH else "stop"
            text += self._text.finish()
        if text:
            deltas.append(self._delta(text))
        if self.finish_reason is not None:
            deltas.append(self._delta("", self.finish_reason))
        return deltas

    def _delta(self, text: str, finish_reason: Literal["stop", "length"] | None = None) -> ChoiceDelta:
        """A delta, with what belongs to the tokens that have begun in the text given out so far: at the end, to all."""
        num_tokens = self._text.num_settled if self.finish_reason is None else self.num_tokens
        prompt_routing, self._prompt_routing = self._prompt_routing, None
        prompt_tokens, self._prompt_tokens = self._prompt_tokens, ()
        return ChoiceDelta(
            index=self.index,
            text=text,
            tokens=prompt_tokens + self._scores.take_up_to(num_tokens),
            routing=self._routing.take_up_to(num_tokens),
            prompt_routing=prompt_routing,
            finish_reason=finish_reason,
        )

    def _start(self, event: TokenEvent) -> list[ChoiceDelta]:
        self._started = True
        self.num_cached_tokens = event.num_cached_tokens
        if event.prompt_routing is not None:
            self._prompt_routing = tuple(map(token_trace, event.prompt_routing))
        if self._echo is None:
            return []
        if event.prompt_logprobs is not None:
            self._prompt_tokens = list_prompt(self._echo, event.prompt_logprobs, self._tokenizer)
        # A prompt of control tokens given as ids has no text; its tokens then come with the next.
        return [self._delta(self._echo.text)] if self._echo.text else []

    def _num_listed(self, event: TokenEvent, num_read: int) -> int:
        """How many of the event's tokens are listed: all that were read, but for the one that ended the sequence.

        A stop id that the caller wants to see in the text is listed too; an end-of-sequence id never is.
        """
        if event.finish_reason is not FinishReason.STOP or num_read < len(event.token_ids):
            return num_read
        is_eos = stop_reason(event, self._params) is None
        return num_read - 1 if is_eos or not self._params.include_stop_str_in_output else num_read


class TokenLocator:
    """Where the text of each token begins."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, *, drop_leading_space: bool, base: int) -> None:
        self._measure = Detokenizer(
            tokenizer.vocabulary, skip_special_tokens=params.skip_special_tokens, drop_leading_space=drop_leading_space
        )
        self._position = base  # where the next token's text begins

    def locate(self, entry: TokenLogprobs) -> ScoredToken:
        token = ScoredToken(entry.token_id, entry.logprob, entry.top, self._position)
        self._position += len(self._measure.push(entry.token_id))
        return token


class Pending(Generic[T]):
    """What the engine told of tokens, one item each, until the delta they are listed in."""

    def __init__(self) -> None:
        self._items: deque[T] = deque()
        self._num_taken = 0

    def push(self, items: Iterable[T]) -> None:
        self._items.extend(items)

    def take_up_to(self, num_tokens: int) -> tuple[T, ...]:
        """The next items, so many that those of the first `num_tokens` tokens are taken in all."""
        if not self._items:
            return ()
        count = min(num_tokens - self._num_taken, len(self._items))
        self._num_taken += count
        return tuple(self._items.popleft() for _ in range(count))


def list_prompt(echo: Echo, scores: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> tuple[ScoredToken, ...]:
    """The echoed prompt's tokens. Nothing stands before the first, so it has no score.

    A control token has a place in the text where the client wrote it there; one that was given as an id, or that the
    tokenizer added, has none.
    """
    measure = Detokenizer(tokenizer.vocabulary, skip_special_tokens=True, drop_leading_space=True)
    tokens = [ScoredToken(echo.prompt_ids[0], None, (), 0)]
    position = 0
    for entry in scores:
        last = tokens[-1].token_id
        text = measure.push(last)
        if tokenizer.is_special(last) and echo.text.startswith(tokenizer.token_text(last), position):
            text = tokenizer.token_text(last)
        elif not echo.text.startswith(text, position):
            text = text.removeprefix(" ")  # which a SentencePiece-like tokenizer puts after a control token
        position += len(text)
        tokens.append(ScoredToken(entry.token_id, entry.logprob, entry.top, position))
    return tuple(tokens)
