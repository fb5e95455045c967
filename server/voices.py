"""What a chat's choice says, as OpenAI's messages and deltas: text as it is, or text with calls of tools in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from server.choices import ChoiceDelta, ScoredToken
from server.protocol.chat import AnswerMessage, Delta
from server.protocol.routing import TokenTrace
from server.protocol.tools import FunctionDelta, ToolCall
from server.tools.parser import CallArguments, CallBegun, CallParser, Piece, Said

Ending = Literal["stop", "length"]
FinishReason = Ending | Literal["tool_calls"]

_SLICE = 1024
"""Characters that the parser is given at once: it copies what is left whenever a marker turns out to be none."""


@dataclass(frozen=True, slots=True)
class Utterance:
    """One chunk of a stream: its delta, what belongs to its tokens, and how the choice ended, if it did."""

    delta: Delta
    told: ChoiceDelta | None = None
    finish_reason: FinishReason | None = None


class Voice(Protocol):
    """One choice of a streamed chat."""

    def say(self, delta: ChoiceDelta) -> Iterable[Utterance]:
        """The chunks that `delta` brings."""


class PlainVoice:
    """The text is the content. The first chunk has the role."""

    def __init__(self) -> None:
        self._introduced = False

    def say(self, delta: ChoiceDelta) -> list[Utterance]:
        content: Delta = {"content": delta.text} if delta.text else {}
        utterance = Utterance(content, delta, delta.finish_reason)
        if self._introduced:
            return [utterance]
        self._introduced = True
        return [Utterance({"role": "assistant", "content": ""}), utterance]


class CallingVoice:
    """The text has calls in it.

    The first chunk has the role, and null as content when a call comes first. What belongs to the tokens of text that
    is held back comes with the next chunk.
    """

    def __init__(self, parser: CallParser) -> None:
        self._parser = parser
        self._introduced = False
        self._tokens: list[ScoredToken] = []
        self._routing: list[TokenTrace] = []
        self._prompt_routing: tuple[TokenTrace, ...] | None = None

    def say(self, delta: ChoiceDelta) -> list[Utterance]:
        self._tokens += delta.tokens
        self._routing += delta.routing
        self._prompt_routing = delta.prompt_routing or self._prompt_routing
        pieces = self._parser.push(delta.text)
        if delta.finish_reason is not None:
            pieces += self._parser.finish()
        elif not pieces:
            return []
        utterances: list[Utterance] = []
        if not self._introduced:
            self._introduced = True
            is_call = bool(pieces) and not isinstance(pieces[0], Said)
            utterances.append(Utterance({"role": "assistant", "content": None if is_call else ""}))
        for piece in pieces:
            utterances.append(Utterance(_delta(piece), self._take(delta.index)))
        if delta.finish_reason is not None:
            reason = finish_reason(self._parser, delta.finish_reason)
            utterances.append(Utterance({}, self._take(delta.index), reason))
        return utterances

    def _take(self, index: int) -> ChoiceDelta:
        """What belongs to the tokens so far."""
        told = ChoiceDelta(
            index=index,
            tokens=tuple(self._tokens),
            routing=tuple(self._routing),
            prompt_routing=self._prompt_routing,
        )
        self._tokens.clear()
        self._routing.clear()
        self._prompt_routing = None
        return told


def finish_reason(parser: CallParser, ending: Ending) -> FinishReason:
    """`tool_calls` when the model stopped by itself and at least one call was whole."""
    return "tool_calls" if ending == "stop" and parser.num_whole else ending


def message(text: str, parser: CallParser | None) -> AnswerMessage:
    """A whole answer. With a parser, the very pieces that a stream has."""
    if parser is None:
        return {"role": "assistant", "content": text, "refusal": None}
    pieces: list[Piece] = []
    for start in range(0, len(text), _SLICE):
        pieces += parser.push(text[start : start + _SLICE])
    pieces += parser.finish()
    said = [piece.text for piece in pieces if isinstance(piece, Said)]
    begun = [piece for piece in pieces if isinstance(piece, CallBegun)]
    arguments: list[list[str]] = [[] for _ in begun]
    for piece in pieces:
        if isinstance(piece, CallArguments):
            arguments[piece.index].append(piece.text)
    found: AnswerMessage = {"role": "assistant", "content": "".join(said), "refusal": None}
    if begun:
        calls: list[ToolCall] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": "".join(texts)}}
            for call, texts in zip(begun, arguments, strict=True)
        ]
        found["tool_calls"] = calls
        found["content"] = found["content"] or None
    return found


def _delta(piece: Piece) -> Delta:
    match piece:
        case Said(text):
            return {"content": text}
        case CallBegun(index, call_id, name):
            function: FunctionDelta = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
