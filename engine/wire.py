"""What the server's process and the engine's process say to each other, over one stream socket.

A frame is a 4-byte little-endian length and a msgpack payload of that many bytes: `[tag, field, ...]`, where the tag
names the message and the values of engine/types.py are maps by field name. Nothing in it can name code to be run.

    server process                         engine process
                      <- Hello(version)                       each side refuses another version
    Hello(version) ->
    Start(config)  ->
                      <- Ready(info) | Failed(kind, message)
    UseVocabulary  ->                                       before the first request with a grammar
    Add, Abort     ->
                      <- StepOutput(events, aborted, stats)   one a step
                      <- Heartbeat(busy_seconds)              from a thread of its own, also while a step runs
    AskExperts, …  ->
                      <- Answer(ask_id, …)                    between two steps
    Shutdown       ->
                      end of file
"""

from __future__ import annotations

import asyncio
import socket
from enum import StrEnum

import msgspec

from engine.config import EngineConfig
from engine.grammar.vocabulary import GrammarVocabulary
from engine.types import CapacityWhatIf, EngineInfo, EngineStats, ExpertReport, Request, TokenEvent

PROTOCOL_VERSION = 3
"""Goes up with every change of a message or of a type inside one. `Hello` itself never changes."""

MAX_FRAME_BYTES = 256 * 2**20
"""Room for the logprobs of some 700,000 prompt tokens in one step, and far below what would exhaust memory."""

HEARTBEAT_SECONDS = 0.5
"""How often the engine process says that it lives."""

_HEADER_BYTES = 4


class WireError(Exception):
    """The other side sent something that is not this protocol. The message is one line."""


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """First message in both directions."""

    version: int


class Start(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Load what `config` names; `progress` draws a bar on the standard error stream."""

    config: EngineConfig
    progress: bool


class UseVocabulary(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What the tokens stand for, without which no grammar can be followed."""

    vocabulary: GrammarVocabulary


class Add(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Serve a request that has been checked (engine/validate.py)."""

    request: Request


class Abort(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Drop a request. Answered by its id in the next `StepOutput.aborted`, whether or not it was still live."""

    request_id: str


class AskExperts(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What does the routing record say? Answered with a report. Routing must be recorded, here and below."""

    ask_id: int


class AskWhatIf(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What would a capacity factor have dropped? Answered with a what-if."""

    ask_id: int
    capacity_factor: float


class ResetExperts(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Start the routing record anew. Answered with the report until now."""

    ask_id: int


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Leave after the current step, whatever is in flight."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The model is loaded."""

    info: EngineInfo


class StepOutput(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What one step did. Of a request whose id is in `aborted`, nothing follows."""

    events: list[TokenEvent]
    aborted: list[str]
    stats: EngineStats


class Answer(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """To the question of that id."""

    ask_id: int
    report: ExpertReport | None = None
    what_if: CapacityWhatIf | None = None


class Heartbeat(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`busy_seconds`: for how long the current step has been running; 0 between steps."""

    busy_seconds: float


class FailureKind(StrEnum):
    CONFIGURATION = "configuration"  # the options or the checkpoint: the operator's to fix
    CRASH = "crash"  # anything else


class Failed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The engine process is about to exit; `message` is one line."""

    kind: FailureKind
    message: str


ToEngine = Hello | Start | UseVocabulary | Add | Abort | AskExperts | AskWhatIf | ResetExperts | Shutdown
FromEngine = Hello | Ready | StepOutput | Answer | Heartbeat | Failed

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """`message` as one frame. Raises WireError when it would be longer than MAX_FRAME_BYTES."""
    frame = bytearray(_HEADER_BYTES)
    _encoder.encode_into(message, frame, _HEADER_BYTES)
    size = len(frame) - _HEADER_BYTES
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a {type(message).__name__} message of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
    frame[:_HEADER_BYTES] = size.to_bytes(_HEADER_BYTES, "little")
    return bytes(frame)


def receive_to_engine(sock: socket.socket) -> ToEngine | None:
    """The next message to the engine, from a blocking socket; None at the end of the stream. Raises WireError."""
    header = _receive_exactly(sock, _HEADER_BYTES)
    if header is None:
        return None
    payload = _receive_exactly(sock, _payload_bytes(header))
    if payload is None:
        return None
    try:
        return _to_engine.decode(payload)
    except msgspec.MsgspecError as error:
        raise WireError(f"malformed message to the engine: {error}") from None


async def receive_from_engine(reader: asyncio.StreamReader) -> FromEngine | None:
    """The next message from the engine; None at the end of the stream, however it ended. Raises WireError."""
    try:
        header = await reader.readexactly(_HEADER_BYTES)
        payload = await reader.readexactly(_payload_bytes(header))
    except (asyncio.IncompleteReadError, OSError):
        return None
    try:
        return _from_engine.decode(payload)
    except msgspec.MsgspecError as error:
        raise WireError(f"malformed message from the engine: {error}") from None


def check_hello(message: ToEngine | FromEngine) -> None:
    """Raise WireError unless `message` is a greeting in this version of the protocol."""
    if not isinstance(message, Hello):
        raise WireError(f"expected Hello first, got {type(message).__name__}")
    if message.version != PROTOCOL_VERSION:
        raise WireError(
            f"the other process speaks protocol version {message.version}, this one {PROTOCOL_VERSION}: "
            "mixserve was changed while it ran, restart it"
        )


def _payload_bytes(header: bytes) -> int:
    size = int.from_bytes(header, "little")
    if size > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {size} bytes is over the limit of {MAX_FRAME_BYTES}")
    return size


def _receive_exactly(sock: socket.socket, num_bytes: int) -> bytes | None:
    """`num_bytes` bytes, or None when the stream ends before."""
    buffer = bytearray(num_bytes)
    view = memoryview(buffer)
    while view:
        try:
            received = sock.recv_into(view)
        except ConnectionError:
            return None
        if received == 0:
            return None
        view = view[received:]
    return bytes(buffer)
