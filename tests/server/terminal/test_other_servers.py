"""The client, against servers that say anything."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Iterator

import pytest

from server.terminal.chat import Chat
from server.terminal.client import ChatClient, Piece, Turn
from server.terminal.http import ClientError
from server.terminal.lines import plain_lines
from server.terminal.screen import Screen
from tests.server.terminal.stub import answer, chunk, stream, stub_server

TURNS: list[Turn] = [{"role": "user", "content": "Hi"}]
WHOLE = [chunk(""), chunk("Hel"), chunk("lo"), chunk(finish_reason="stop"), '{"choices": [], "usage": null}']


@pytest.fixture(autouse=True)
def _every_response_is_as_it_should_be(wrong_responses: list[str]) -> Iterator[None]:
    """Not here: they are other servers'."""
    yield
    wrong_responses.clear()


def ask(url: str, api_key: str | None = None) -> list[Piece]:
    with ChatClient(url, api_key) as client:
        return list(client.stream(TURNS, {"model": "m", "seed": 5}))


def text_of(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def error_of(content: bytes | list[bytes], api_key: str | None = None) -> ClientError:
    with stub_server(content) as stub, pytest.raises(ClientError) as caught:
        ask(stub.url, api_key)
    assert "\n" not in str(caught.value)
    return caught.value


def test_what_is_sent() -> None:
    with stub_server(stream(*WHOLE)) as stub:
        ask(stub.url, "sk-5")
    assert stub.heads[0].startswith("POST /v1/chat/completions HTTP/1.1\r\n")
    head = stub.heads[0].lower()
    assert "\r\nauthorization: bearer sk-5\r\n" in head
    assert "\r\ncontent-type: application/json\r\n" in head
    options = {"stream": True, "stream_options": {"include_usage": True}}
    assert stub.bodies == [{"messages": TURNS, "model": "m", "seed": 5} | options]


def test_no_key_no_header() -> None:
    with stub_server(stream(*WHOLE)) as stub:
        ask(stub.url)
    assert "authorization" not in stub.heads[0].lower()


def test_half_a_surrogate_pair_reaches_the_server() -> None:
    with stub_server(stream(*WHOLE)) as stub, ChatClient(stub.url, None) as client:
        list(client.stream([{"role": "user", "content": "\udc80\U0001f600"}], {}))
    assert stub.bodies[0]["messages"][0]["content"] == "\udc80\U0001f600"


def test_events_in_any_pieces() -> None:
    """Characters split over packets, other line ends, comments, and separators that are none to a stream of events."""
    text = "a\u2028b\x85c\x1cé\U0001f600"
    content = stream(chunk(text), chunk("!"), chunk(finish_reason="stop")).replace(b"data: {", b": hi\r\ndata:{", 1)
    head, events = content.split(b"\r\n\r\n", 1)
    with stub_server([head + b"\r\n\r\n", *(events[at : at + 1] for at in range(len(events)))]) as stub:
        assert text_of(ask(stub.url)) == f"{text}!"
    with stub_server(head + b"\r\n\r\n" + events.replace(b"\n", b"\r\n")) as stub:
        assert text_of(ask(stub.url)) == f"{text}!"


def test_chunks_of_other_servers() -> None:
    """No delta, null where a list would be, fields nobody knows, the first choice of several."""
    chunks = [
        '{"choices": null, "prompt_filter_results": [{}]}',
        '{"choices": [{"index": 0, "finish_reason": null}]}',
        '{"choices": [{"delta": {"role": "assistant", "content": null, "refusal": null}}], "usage": null}',
        '{"choices": [{"delta": {"content": "Yes", "reasoning": "x"}, "logprobs": {}}], "usage": {"total_tokens": 1}}',
        '{"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}',
    ]
    with stub_server(stream(*chunks)) as stub:
        pieces = ask(stub.url)
    assert text_of(pieces) == "Yes"
    assert pieces[-1] == Piece("", "stop", 2)


def test_a_stream_without_done_is_whole_if_it_has_a_finish_reason() -> None:
    with stub_server(stream(*WHOLE, end="")) as stub:
        assert text_of(ask(stub.url)) == "Hello"


@pytest.mark.parametrize("end", ["", "data: [DO", 'data: {"choi'])
def test_a_stream_that_breaks_off(end: str) -> None:
    assert "broke off" in str(error_of(stream(*WHOLE[:3], end=end)))


def test_a_connection_that_breaks() -> None:
    content = stream(*WHOLE[:3], end="").replace(b"Connection: close", b"Content-Length: 5000")
    assert "connection broke" in str(error_of(content))


def test_an_error_in_the_middle() -> None:
    failed = json.dumps({"error": {"message": "It\nfailed.", "type": "server_error", "param": None, "code": "dead"}})
    error = error_of(stream(*WHOLE[:2], failed, end=""))
    assert (str(error), error.code) == ("It failed.", "dead")
    assert str(error_of(stream('{"error": "plain"}'))) == "plain"
    assert "reports an error" in str(error_of(stream('{"error": {}}')))


def refusal(status: str, content: bytes, headers: str = "") -> ClientError:
    return error_of(answer(content, status=status, headers=headers))


def test_refusals() -> None:
    body = b'{"error": {"message": "No.\\nNever.", "type": "x", "param": null, "code": "server_overloaded"}}'
    later = refusal("503 Service Unavailable", body, "Retry-After: 7\r\n")
    assert (str(later), later.code) == ("No. Never; try again in 7 s", "server_overloaded")
    dated = refusal("503 Service Unavailable", body, "Retry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\n")
    assert str(dated) == "No. Never."
    limited = refusal("429 Too Many Requests", body, "Retry-After: 1\r\n")
    assert str(limited).endswith("try again in 1 s")
    wrong_key = refusal("401 Unauthorized", b'{"error": {"message": "Wrong key.", "code": "invalid_api_key"}}')
    assert "--api-key" in str(wrong_key)
    assert str(wrong_key).endswith("Wrong key.")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<html>\nnginx</html>", "HTTP 502 Bad Gateway"),
        (b"", "HTTP 502 Bad Gateway"),
        (b'{"detail": [1]}', "HTTP 502 Bad Gateway"),
        (b'{"error": {"message": null, "code": 502}}', "HTTP 502 Bad Gateway"),
        (b'{"error": "upstream"}', "upstream"),
        (b'{"object": "error", "message": "old style", "code": 502}', "old style"),
        (b'{"detail": ' + b"[" * 100_000, "HTTP 502 Bad Gateway"),
        (b'{"error": "\xff"}', "HTTP 502 Bad Gateway"),
    ],
)
def test_refusals_in_other_shapes(content: bytes, said: str) -> None:
    assert str(refusal("502 Bad Gateway", content)) == said


def test_a_conversation_over_the_context() -> None:
    """Other servers say so in words alone."""
    full = b'{"error": {"message": "This model\'s maximum context length is 4096 tokens.", "code": 400}}'
    out, err = io.StringIO(), io.StringIO()
    with stub_server(answer(full, status="400 Bad Request")) as stub, ChatClient(stub.url, None) as client:
        chat = Chat(client, {}, "", Screen(out, err, colour=False), interactive=False)
        assert not chat.run(plain_lines(io.StringIO("Hi\n")))
    assert err.getvalue().endswith("4096 tokens; /reset forgets the conversation\n")


def test_an_error_page_without_end_is_not_read_to_it() -> None:
    parts = [answer(b"", status="500 Internal Server Error", headers=""), *([b"x" * 2**16] * 1000)]
    with stub_server(parts) as stub, pytest.raises(ClientError, match="HTTP 500 Internal Server Error"):
        ask(stub.url)
    assert stub.client_left


@pytest.mark.parametrize(
    "content",
    [
        answer(b"<html></html>", headers="Content-Type: text/html\r\n"),
        answer(b'{"choices": []}'),
        stream("no json"),
        stream("[1]"),
        stream('{"choices": 5}'),
        stream('{"choices": [{"delta": {"content": 5}}]}'),
        b"SSH-2.0-OpenSSH_9.9\r\n",
    ],
)
def test_no_such_server(content: bytes) -> None:
    assert str(error_of(content))


def test_nobody_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    start = time.monotonic()
    for url in (f"http://127.0.0.1:{port}", "http://no-such-host.invalid"):
        with pytest.raises(ClientError, match=f"no server answers at {url}"):
            ask(url)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("key", ["a b", "schlüssel", "a\r\nX-Evil: 1", "\x00"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    with pytest.raises(ClientError, match="printable ASCII"):
        ChatClient("http://127.0.0.1:1", key)


def test_lists_of_models() -> None:
    models = [b'{"object": "list", "data": [{"id": "a", "object": "model"}, {"id": "b"}]}', b'{"data": []}', b"{}"]
    with stub_server(*map(answer, models)) as stub, ChatClient(stub.url, "k") as client:
        assert client.first_model() == "a"
        assert stub.heads[0].startswith("GET /v1/models HTTP/1.1\r\n")
        with pytest.raises(ClientError, match="--model"):
            client.first_model()
        with pytest.raises(ClientError, match="URL"):
            client.first_model()
