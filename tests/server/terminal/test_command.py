"""The command in scripts: lines in, answers out, nothing else."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from engine.text import Tokenizer
from server.config import EdgeConfig, ServerConfig
from server.edge.keys import ApiKey
from tests.server.conftest import ANSWER
from tests.server.fake_engine import FakeEngine
from tests.server.harness import MODEL, Live, live_server
from tests.server.terminal.pty_process import CHAT, ROOT, chat_environment
from tests.server.terminal.stub import answer, chunk, stream, stub_server
from tests.server.test_client_leaves import wait

TEXT = ANSWER.strip()
MODELS = answer(b'{"object": "list", "data": [{"id": "first"}]}')
HELLO = stream(chunk("Hello"), chunk(finish_reason="stop"))


def chat(
    typed: str | bytes, *args: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*CHAT, *args],
        input=typed if isinstance(typed, bytes) else typed.encode(),
        cwd=ROOT,
        env=environment or chat_environment(Path("/nonexistent")),
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_a_script(server: Live) -> None:
    result = chat("Hi\nAnd you?", "--url", f"{server.url}/v1/", "--temperature", "0", "--max-tokens", "3")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"Hello from the\n" * 2
    requests = server.call(server.engine.requests.copy)
    assert [(request.params.temperature, request.params.max_tokens) for request in requests] == [(0, 3)] * 2


def test_a_script_that_fails_somewhere(server: Live) -> None:
    result = chat("Hi\n/foo\nHi\n", "--url", server.url)
    assert result.returncode == 1
    assert result.stdout.decode() == f"{TEXT}\n" * 2
    assert result.stderr.startswith(b"error: there is no /foo")


def test_another_model(server: Live) -> None:
    result = chat("Hi\n", "--url", server.url, "--model", "other")
    assert result.returncode == 1
    assert result.stderr.count(b"\n") == 1
    assert b"other" in result.stderr


def test_what_is_sent() -> None:
    args = ("--model", "m", "--system", "S", "--seed", "-3", "--temperature", "0.5", "--max-tokens", "9")
    with stub_server(HELLO) as stub:
        chat("Hi\n", "--url", stub.url, *args)
    assert stub.bodies == [
        {
            "model": "m",
            "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "seed": -3,
            "temperature": 0.5,
            "max_tokens": 9,
        }
    ]


def test_bytes_that_are_no_text() -> None:
    with stub_server(MODELS, HELLO) as stub:
        result = chat(b"H\xffi\r\n", "--url", stub.url)
    assert stub.bodies[1] == {
        "model": "first",
        "messages": [{"role": "user", "content": "H\ufffdi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert (result.returncode, result.stdout) == (0, b"Hello\n")


def test_output_that_cannot_hold_a_character() -> None:
    with stub_server(MODELS, stream(chunk("é\U0001f600!"), chunk(finish_reason="stop"))) as stub:
        environment = chat_environment(Path("/nonexistent"), PYTHONIOENCODING="latin-1")
        result = chat("Hi\n", "--url", stub.url, environment=environment)
    assert (result.returncode, result.stdout) == (0, b"\xe9?!\n")


@pytest.mark.parametrize(
    ("args", "environment", "key"),
    [
        ((), {}, None),
        ((), {"OPENAI_API_KEY": "o"}, "o"),
        ((), {"OPENAI_API_KEY": "o", "MIXSERVE_API_KEY": "m"}, "m"),
        (("--api-key", "a"), {"OPENAI_API_KEY": "o", "MIXSERVE_API_KEY": "m"}, "a"),
        ((), {"OPENAI_API_KEY": "o", "MIXSERVE_API_KEY": ""}, "o"),
        ((), {"OPENAI_API_KEY": "o", "MIXSERVE_API_KEY": " m1,m2\n"}, "m1"),
    ],
)
def test_where_the_key_comes_from(args: tuple[str, ...], environment: dict[str, str], key: str | None) -> None:
    with stub_server(MODELS, HELLO) as stub:
        chat("Hi\n", "--url", stub.url, *args, environment=chat_environment(Path("/nonexistent"), **environment))
    assert len(stub.heads) == 2
    for head in stub.heads:
        sent = [line for line in head.lower().split("\r\n") if line.startswith("authorization")]
        assert sent == ([] if key is None else [f"authorization: bearer {key}"])


def one_error(result: subprocess.CompletedProcess[bytes]) -> str:
    """The one line that a chat which cannot begin ends with."""
    assert (result.returncode, result.stdout) == (1, b"")
    line, rest = result.stderr.decode().split("\n")
    assert rest == ""
    assert line.startswith("mixserve: error: ")
    return line.removeprefix("mixserve: error: ")


def test_no_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    assert one_error(chat("Hi\n", "--url", url)) == f"no server answers at {url}"
    result = chat("Hi\n", "--url", url, "--model", "m")
    assert (result.returncode, result.stderr.decode()) == (1, f"error: no server answers at {url}\n")


def test_a_server_with_keys(tokenizer: Tokenizer) -> None:
    config = ServerConfig(served_model_name=MODEL, edge=EdgeConfig(api_keys=(ApiKey.of("sk-1"),)))
    with live_server(lambda: FakeEngine(lambda _: [5]), tokenizer, config) as live:
        assert chat("Hi\n", "--url", live.url, "--api-key", "sk-1").returncode == 0
        for args in ((), ("--api-key", "sk-2")):
            assert "--api-key, MIXSERVE_API_KEY): " in one_error(chat("Hi\n", "--url", live.url, *args))
        result = chat("Hi\nHi\n", "--url", live.url, "--model", MODEL)
        assert (result.returncode, result.stderr.count(b"\n"), result.stdout) == (1, 2, b"")


def test_a_key_that_a_server_refuses_with_an_escape_sequence() -> None:
    error = {"message": "Wrong\x1b[2J key.", "type": "invalid_request_error", "param": None, "code": "invalid_api_key"}
    with stub_server(answer(json.dumps({"error": error}).encode(), status="401 Unauthorized")) as stub:
        line = one_error(chat("Hi\n", "--url", stub.url, "--api-key", "x"))
    assert line == "the server wants another API key (--api-key, MIXSERVE_API_KEY): Wrong␛[2J key."


def test_a_server_that_is_loading() -> None:
    error = {"message": "The model is still loading.", "code": "server_overloaded"}
    loading = answer(json.dumps({"error": error}).encode(), status="503 x", headers="Retry-After: 5\r\n")
    with stub_server(loading) as stub:
        assert one_error(chat("", "--url", stub.url)) == "The model is still loading; try again in 5 s"


def test_ctrl_c_ends_a_script(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "script", lambda _: [5] * 10_000))
    server.call(lambda: setattr(server.engine, "step_seconds", 0.02))
    process = subprocess.Popen(
        [*CHAT, "--url", server.url, "--model", MODEL],
        cwd=ROOT, env=chat_environment(Path("/nonexistent")), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Hi\nHi\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    wait(lambda: server.call(lambda: len(server.engine.aborted)) == 1)


def test_a_reader_that_leaves(server: Live) -> None:
    server.call(lambda: setattr(server.engine, "script", lambda _: [5] * 10_000))
    process = subprocess.Popen(
        [*CHAT, "--url", server.url],
        cwd=ROOT, env=chat_environment(Path("/nonexistent")), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdin.write(b"Hi\n")
        process.stdin.close()
        assert process.wait(10) == 1
        assert process.stderr.read() == b""
