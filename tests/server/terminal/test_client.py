"""The client, against the real app."""

from __future__ import annotations

from server.terminal.client import ChatClient, Turn
from tests.server.harness import MODEL, Live
from tests.server.test_client_leaves import wait

TURNS: list[Turn] = [{"role": "user", "content": "Hi"}]


def test_the_real_app(server: Live) -> None:
    with ChatClient(server.url, None) as client:
        assert client.first_model() == MODEL
        pieces = list(client.stream(TURNS, {"model": MODEL, "max_tokens": 3}))
        assert client.first_model() == MODEL
    assert "".join(piece.text for piece in pieces) == "Hello from the"
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
    assert [piece.num_tokens for piece in pieces if piece.num_tokens] == [3]
    assert server.call(lambda: server.engine.aborted) == []


def test_closing_the_stream_stops_the_answer(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "script", lambda _: [5] * 10_000))
    server.call(lambda: setattr(server.engine, "step_seconds", 0.01))
    with ChatClient(server.url, None) as client:
        pieces = client.stream(TURNS, {"model": MODEL})
        next(pieces)
        pieces.close()
        assert wait(lambda: server.call(lambda: len(server.engine.aborted)) == 1) < 1
