"""engine/wire.py: what goes in comes out, and what is not the protocol is refused."""

from __future__ import annotations

import asyncio
import socket

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import wire
from engine.config import EngineConfig
from engine.types import (
    CapacityWhatIf,
    EngineStats,
    ExpertReport,
    ExpertVisits,
    FinishReason,
    LayerRouting,
    Request,
    RoutingStats,
    SamplingParams,
    Steering,
    TokenEvent,
    TokenLogprobs,
    TokenRouting,
)
from tests.engine.fake_core import make_info, make_request

INTS = st.integers(-(2**63), 2**63 - 1)
IDS = st.integers(0, 2**31)
FLOATS = st.floats(allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
OPTIONAL_INT = st.none() | INTS
LOGPROBS = st.builds(TokenLogprobs, IDS, FLOATS, IDS, st.lists(st.tuples(IDS, FLOATS), max_size=3).map(tuple))
PARAMS = st.builds(
    SamplingParams,
    max_tokens=OPTIONAL_INT,
    temperature=FLOATS,
    top_k=INTS,
    logit_bias=st.lists(st.tuples(IDS, FLOATS), max_size=3).map(tuple),
    seed=OPTIONAL_INT,
    logprobs=OPTIONAL_INT,
    stop=st.lists(TEXT, max_size=3).map(tuple),
    stop_token_ids=st.lists(IDS, max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)
EXPERT_IDS = st.lists(IDS, max_size=3).map(tuple)
SHARES = st.lists(FLOATS, max_size=3).map(tuple)
STEERINGS = st.builds(
    Steering,
    experts_per_token=OPTIONAL_INT,
    forbidden=st.lists(st.tuples(OPTIONAL_INT, EXPERT_IDS), max_size=3).map(tuple),
    min_p=FLOATS,
)
ROUTINGS = st.builds(
    TokenRouting, st.lists(EXPERT_IDS, max_size=2).map(tuple), st.lists(SHARES, max_size=2).map(tuple), SHARES
)
LAYER = LayerRouting(
    assigned=(3, 0, 2**40),
    dispatched=(3, 0, 7),
    dropped=2**40 - 7,
    max_over_mean=1.5,
    coefficient_of_variation=0.25,
    entropy=1.0,
    entropy_share=0.72,
    auxiliary_loss=1.01,
    mean_probability=(0.5, 0.25, 0.25),
    effective_batch=2.5,
    distinct_experts=1.75,
)
STATS_OF_EXPERTS = RoutingStats(tokens=4, steps=2, pooled_auxiliary_loss=2.25, layers=(LAYER, LAYER))
REPORTS = st.builds(
    ExpertReport,
    router=TEXT,
    num_experts=st.just(3),
    num_experts_per_tok=st.just(2),
    capacity_factor=st.none() | FLOATS,
    simulation=st.none() | TEXT,
    window=st.just(STATS_OF_EXPERTS),
    total=st.just(STATS_OF_EXPERTS),
    recomputed_tokens=IDS,
)
WHAT_IFS = st.builds(
    CapacityWhatIf,
    capacity_factor=FLOATS,
    window_steps=IDS,
    window_assigned=IDS,
    window_overflow=st.lists(EXPERT_IDS, max_size=2).map(tuple),
    total_capacity_factor=FLOATS,
    total_assigned=IDS,
    total_overflow=st.lists(EXPERT_IDS, max_size=2).map(tuple),
)
REQUESTS = st.builds(
    Request,
    request_id=TEXT,
    prompt_ids=st.lists(IDS, max_size=50).map(tuple),
    params=PARAMS,
    priority=INTS,
    cache_salt=st.none() | TEXT,
    steering=st.none() | STEERINGS,
    trace_routing=st.booleans(),
    trace_prompt_routing=st.booleans(),
)
EVENTS = st.builds(
    TokenEvent,
    request_id=TEXT,
    token_ids=st.lists(IDS, max_size=3).map(tuple),
    logprobs=st.none() | st.lists(LOGPROBS, max_size=3).map(tuple),
    prompt_logprobs=st.none() | st.lists(LOGPROBS, max_size=3).map(tuple),
    routing=st.none() | st.lists(ROUTINGS, max_size=2).map(tuple),
    prompt_routing=st.none() | st.lists(ROUTINGS, max_size=2).map(tuple),
    expert_visits=st.none() | st.builds(ExpertVisits, IDS, IDS),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | IDS,
    error=st.none() | TEXT,
)
STATS = st.builds(EngineStats, num_running=IDS, peak_memory_bytes=st.integers(0, 2**50))
TO_ENGINE = st.one_of(
    st.builds(wire.Hello, INTS),
    st.builds(wire.Start, st.builds(EngineConfig, model=TEXT, max_model_len=st.none() | IDS), st.booleans()),
    st.builds(wire.Add, REQUESTS),
    st.builds(wire.Abort, TEXT),
    st.builds(wire.AskExperts, IDS),
    st.builds(wire.AskWhatIf, IDS, FLOATS),
    st.builds(wire.ResetExperts, IDS),
    st.just(wire.Shutdown()),
)
FROM_ENGINE = st.one_of(
    st.builds(wire.Hello, INTS),
    st.just(wire.Ready(make_info())),
    st.builds(wire.StepOutput, st.lists(EVENTS, max_size=4), st.lists(TEXT, max_size=3), STATS),
    st.builds(wire.Answer, IDS, report=st.none() | REPORTS, what_if=st.none() | WHAT_IFS),
    st.builds(wire.Heartbeat, st.floats(0, 1e6)),
    st.builds(wire.Failed, st.sampled_from(wire.FailureKind), TEXT),
)


def sent_to_engine(*data: bytes) -> list[wire.ToEngine | None]:
    """What the engine's side makes of `data`, up to the end of the stream."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for frame in data:
            ours.sendall(frame)
        ours.shutdown(socket.SHUT_WR)
        messages: list[wire.ToEngine | None] = []
        while not messages or messages[-1] is not None:
            messages.append(wire.receive_to_engine(theirs))
        return messages


def sent_from_engine(*data: bytes) -> list[wire.FromEngine | None]:
    """What the server's side makes of `data`, up to the end of the stream."""

    async def receive() -> list[wire.FromEngine | None]:
        reader = asyncio.StreamReader()
        for frame in data:
            reader.feed_data(frame)
        reader.feed_eof()
        messages: list[wire.FromEngine | None] = []
        while not messages or messages[-1] is not None:
            messages.append(await wire.receive_from_engine(reader))
        return messages

    return asyncio.run(receive())


@given(st.lists(TO_ENGINE, max_size=3))
def test_round_trip_to_the_engine(messages: list[wire.ToEngine]) -> None:
    assert sent_to_engine(*map(wire.encode, messages)) == [*messages, None]


@given(st.lists(FROM_ENGINE, max_size=3))
def test_round_trip_from_the_engine(messages: list[wire.FromEngine]) -> None:
    received = sent_from_engine(*map(wire.encode, messages))
    assert received == [*messages, None]
    assert [type(message) for message in received[:-1]] == [type(message) for message in messages]


def test_steering_that_crossed_the_wire_is_the_same_way_of_steering() -> None:
    """It is looked up by value, and its digest is part of a cache key: an int for a min-p becomes a float."""
    steering = Steering(experts_per_token=3, forbidden=((None, (1,)), (0, (2, 3))), min_p=1)
    request = Request(request_id="a", prompt_ids=(1,), params=SamplingParams(), steering=steering)
    [message, _] = sent_to_engine(wire.encode(wire.Add(request)))
    assert isinstance(message, wire.Add)
    received = message.request.steering
    assert received is not None
    assert received == steering
    assert hash(received) == hash(steering)
    assert received.digest() == Steering(experts_per_token=3, forbidden=((None, (1,)), (0, (2, 3))), min_p=1.0).digest()


def test_types_survive() -> None:
    event = TokenEvent(request_id="a", token_ids=(1, 2), finish_reason=FinishReason.STOP)
    [output, _] = sent_from_engine(wire.encode(wire.StepOutput([event], [], EngineStats())))
    assert isinstance(output, wire.StepOutput)
    assert isinstance(output.events[0].token_ids, tuple)
    assert output.events[0].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("num_bytes", [0, 1, 3, 4, 5, 20])
def test_a_stream_that_ends_inside_a_frame_has_ended(num_bytes: int) -> None:
    assert sent_to_engine(wire.encode(wire.Add(make_request("a")))[:num_bytes]) == [None]
    assert sent_from_engine(wire.encode(wire.Ready(make_info()))[:num_bytes]) == [None]


MALFORMED = {
    "empty": (0).to_bytes(4, "little"),
    "not msgpack": b"\x01\x00\x00\x00\xc1",
    "unknown tag": b"\x09\x00\x00\x00\x91\xa7Execute",
    "wrong type": b"\x09\x00\x00\x00\x92\xa5Hello\xa1x",
    "over the limit": (wire.MAX_FRAME_BYTES + 1).to_bytes(4, "little"),
}


@pytest.mark.parametrize("frame", MALFORMED.values(), ids=MALFORMED)
def test_malformed_frames_are_refused(frame: bytes) -> None:
    with pytest.raises(wire.WireError):
        sent_to_engine(frame)
    with pytest.raises(wire.WireError):
        sent_from_engine(frame)


def test_a_message_in_the_wrong_direction_is_refused() -> None:
    with pytest.raises(wire.WireError, match="malformed message to the engine"):
        sent_to_engine(wire.encode(wire.Heartbeat(0.0)))
    with pytest.raises(wire.WireError, match="malformed message from the engine"):
        sent_from_engine(wire.encode(wire.Shutdown()))


def test_an_oversized_message_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    message = wire.Abort("x" * 100)
    size = len(msgspec.msgpack.encode(message))
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", size)
    assert sent_to_engine(wire.encode(message)) == [message, None]
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", size - 1)
    with pytest.raises(wire.WireError, match=f"{size} bytes is over the limit"):
        wire.encode(message)


def test_hello() -> None:
    wire.check_hello(wire.Hello(wire.PROTOCOL_VERSION))
    with pytest.raises(wire.WireError, match="protocol version"):
        wire.check_hello(wire.Hello(wire.PROTOCOL_VERSION + 1))
    with pytest.raises(wire.WireError, match="expected Hello first, got Shutdown"):
        wire.check_hello(wire.Shutdown())


def test_a_step_of_many_sequences_is_small() -> None:
    events = [TokenEvent(request_id=f"request-{i}", token_ids=(i,)) for i in range(256)]
    assert len(wire.encode(wire.StepOutput(events, [], EngineStats()))) < 64 * 1024
