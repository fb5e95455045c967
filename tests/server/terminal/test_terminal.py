"""The command at a terminal."""

from __future__ import annotations

import signal
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.text import Tokenizer
from server.terminal.lines import MAX_HISTORY
from tests.server.conftest import ANSWER
from tests.server.harness import MODEL, Live
from tests.server.terminal.pty_process import PASTE, UP, PtyChat, chat_environment, pty_chat
from tests.server.test_client_leaves import wait

TEXT = ANSWER.strip()
CTRL_D = "\x04"


@pytest.fixture
def chat(server: Live, tmp_path: Path) -> Iterator[PtyChat]:
    with pty_chat("--url", server.url, "--seed", "7", environment=chat_environment(tmp_path)) as chat:
        yield chat


def prompts(live: Live, tokenizer: Tokenizer) -> list[str]:
    requests = live.call(live.engine.requests.copy)
    return [tokenizer.decode(request.prompt_ids, skip_special_tokens=True) for request in requests]


def slow(live: Live) -> None:
    """Answers that would take minutes, though the first words come at once."""
    tokens = live.engine.script(None)  # type: ignore[arg-type]
    live.call(lambda: setattr(live.engine, "script", lambda _: [*tokens, *[tokens[0]] * 10_000]))
    live.call(lambda: setattr(live.engine, "step_seconds", 0.02))


def test_a_conversation(chat: PtyChat, server: Live, tokenizer: Tokenizer) -> None:
    chat.expect(f"\x1b[2m{MODEL} at {server.url}; /help lists the commands\x1b[0m\r\n")
    chat.say("Hi")
    chat.expect(f"{TEXT}\r\n\x1b[2m7 tokens")
    chat.say("/system Be brief.")
    chat.say("/system")
    chat.expect("Be brief.\r\n")
    chat.say("And you?")
    chat.expect(TEXT)
    chat.say("/reset")
    chat.say("Again")
    chat.expect(TEXT)
    chat.expect("> ")
    chat.type(CTRL_D)
    assert chat.exit_code() == 0
    first, second, third = prompts(server, tokenizer)
    assert first == "[INST] Hi [/INST]"
    assert second.startswith("[INST] Be brief.")
    assert f"Hi [/INST] {TEXT} [INST]" in second
    assert second.endswith("And you? [/INST]")
    assert "Again" in third
    assert "Hi" not in third


@pytest.mark.parametrize("by_key", [True, False])
def test_ctrl_c_stops_an_answer(chat: PtyChat, server: Live, tokenizer: Tokenizer, by_key: bool) -> None:
    slow(server)
    chat.say("Hi")
    chat.expect(TEXT)
    assert server.call(lambda: server.engine.stats.num_running) == 1
    stopped = "\r\n\x1b[2m[stopped]\x1b[0m\r\n"
    if by_key:
        chat.ctrl_c(stopped)
    else:
        chat.process.send_signal(signal.SIGINT)
        chat.expect(stopped)
    wait(lambda: server.call(lambda: len(server.engine.aborted)) == 1)
    assert server.call(lambda: server.engine.stats.num_running) == 0
    chat.say("And you?")
    chat.expect(TEXT)
    second = prompts(server, tokenizer)[1]
    assert second.startswith(f"[INST] Hi [/INST] {TEXT}")
    assert "stopped" not in second
    assert second.endswith("[INST] And you? [/INST]")
    chat.ctrl_c("[stopped]")
    chat.expect("> ")
    chat.type("/quit\r")
    assert chat.exit_code() == 0


def test_ctrl_c_before_the_first_word_takes_the_message_back(chat: PtyChat, server: Live, tokenizer: Tokenizer) -> None:
    server.call(server.engine.pause)
    chat.say("Hi")
    wait(lambda: server.call(lambda: server.engine.stats.num_waiting) == 1)
    chat.ctrl_c("[stopped]")
    wait(lambda: server.call(lambda: len(server.engine.aborted)) == 1)
    server.call(server.engine.resume)
    chat.say("You?")
    chat.expect(TEXT)
    assert prompts(server, tokenizer)[1] == "[INST] You? [/INST]"


def test_ctrl_c_at_the_prompt(chat: PtyChat, server: Live, tokenizer: Tokenizer) -> None:
    chat.expect("> ")
    chat.type("nonsense")
    chat.expect("nonsense")
    chat.ctrl_c("Ctrl-C again")
    chat.say("Hi")
    chat.expect(TEXT)
    assert prompts(server, tokenizer) == ["[INST] Hi [/INST]"]
    chat.expect("> ")
    chat.ctrl_c("Ctrl-C again")
    chat.expect("> ")
    chat.ctrl_c(None)
    assert chat.exit_code() == 0


def test_text_of_several_lines(chat: PtyChat, server: Live, tokenizer: Tokenizer) -> None:
    chat.say("one\\")
    chat.expect(". ")
    chat.type("two\r")
    chat.expect(TEXT)
    chat.expect("\x1b[?2004h")  # asks the terminal to mark what is pasted
    chat.say(PASTE.format("three\r\tfour\rfive"))
    chat.expect(TEXT)
    first, second = prompts(server, tokenizer)
    assert first == "[INST] one\ntwo [/INST]"
    assert second.endswith("[INST] three\n\tfour\nfive [/INST]")


def test_what_was_typed_is_remembered(server: Live, tokenizer: Tokenizer, tmp_path: Path) -> None:
    history = tmp_path / "cache" / "chat_history"
    environment = chat_environment(history.parent)
    for typed in ("Hi", UP):
        with pty_chat("--url", server.url, environment=environment) as chat:
            chat.say(typed)
            chat.expect(TEXT)
            chat.expect("> ")
            chat.type(CTRL_D)
            assert chat.exit_code() == 0
        assert stat.S_IMODE(history.stat().st_mode) == 0o600
        history.chmod(0o644)
    assert prompts(server, tokenizer) == ["[INST] Hi [/INST]"] * 2
    assert history.read_text() == "Hi\n"


def test_the_history_is_bounded(server: Live, tmp_path: Path) -> None:
    history = tmp_path / "chat_history"
    history.write_text("".join(f"{number}\n" for number in range(3 * MAX_HISTORY)))
    with pty_chat("--url", server.url, environment=chat_environment(tmp_path)) as chat:
        chat.say("/quit")
        assert chat.exit_code() == 0
    lines = history.read_text().splitlines()
    assert len(lines) == MAX_HISTORY
    assert lines[-2:] == [str(3 * MAX_HISTORY - 1), "/quit"]


def test_a_history_that_cannot_be_written_stops_nobody(server: Live, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pty_chat("--url", server.url, environment=chat_environment(tmp_path / "file" / "cache")) as chat:
        chat.say("Hi")
        chat.expect(TEXT)
        chat.say("/quit")
        assert chat.exit_code() == 0
    assert "error" not in chat.shown


def test_no_colour(server: Live, tmp_path: Path) -> None:
    with pty_chat("--url", server.url, environment=chat_environment(tmp_path, NO_COLOR="1")) as chat:
        chat.expect(f"{MODEL} at ")
        chat.say("Hi")
        chat.expect(f"{TEXT}\r\n7 tokens")
        chat.say("/quit")
        assert chat.exit_code() == 0
    assert "\x1b[2m" not in chat.shown


def test_a_failure_is_no_end(chat: PtyChat, server: Live) -> None:
    server.call(lambda: setattr(server.engine, "fail_at", 2))
    chat.say("Hi")
    chat.expect("Hello from\r\nerror: The request failed inside the engine.\r\n")
    server.call(lambda: setattr(server.engine, "fail_at", None))
    chat.say("Hi")
    chat.expect(TEXT)
    chat.expect("> ")
    chat.type(CTRL_D)
    assert chat.exit_code() == 0
