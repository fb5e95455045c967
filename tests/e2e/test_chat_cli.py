"""`mixserve chat` at a terminal, with a real server."""

from __future__ import annotations

from pathlib import Path

from tests.e2e.running import Server
from tests.server.terminal.pty_process import chat_environment, pty_chat


def test_chat(tiny_server: Server, tmp_path: Path) -> None:
    """A short answer, one that is stopped, one after that; then the server is as free as before."""
    args = ("--url", tiny_server.url, "--temperature", "0", "--max-tokens", "2000")
    with pty_chat(*args, environment=chat_environment(tmp_path)) as chat:
        chat.expect("tiny at ")
        chat.say("Hi")
        tiny_server.wait_for_metric("mixserve_num_requests_running", 1, seconds=10)
        chat.ctrl_c("[stopped]")
        tiny_server.wait_for_metric("mixserve_num_requests_running", 0, seconds=1)
        tiny_server.wait_for_metric("mixserve_requests_aborted_total", 1, seconds=1)
        chat.say("/reset")
        chat.expect("forgotten")
        chat.expect("> ")
        chat.type("\x04")
        assert chat.exit_code() == 0
    args = ("--url", tiny_server.url, "--temperature", "0", "--max-tokens", "5")
    with pty_chat(*args, environment=chat_environment(tmp_path)) as chat:
        for _ in range(2):
            chat.say("Hi")
            chat.expect("5 tokens, ")
        chat.say("/quit")
        assert chat.exit_code() == 0
    assert tiny_server.metric("mixserve_generation_tokens_total") >= 10
