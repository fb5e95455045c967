"""The conversation: what is sent, what is shown, what is remembered. Against the real app over the fake engine."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import partial

import pytest

from engine.text import Tokenizer
from engine.types import Request
from server.terminal.chat import HELP, Answer, Chat
from server.terminal.client import ChatClient
from server.terminal.lines import plain_lines
from server.terminal.screen import Screen
from tests.server.conftest import ANSWER
from tests.server.harness import MODEL, Live
from tests.server.terminal.test_screen import Tty

TEXT = ANSWER.strip()


class Session:
    """A chat that is fed whole scripts. `out` and `err` have what it wrote since the last one."""

    def __init__(
        self, client: ChatClient, live: Live, tokenizer: Tokenizer, *, system: str = "", terminal: bool = False
    ) -> None:
        self._live = live
        self._tokenizer = tokenizer
        self._out, self._err = Tty() if terminal else io.StringIO(), io.StringIO()
        params = {"model": MODEL, "max_tokens": 50, "seed": 7}
        screen = Screen(self._out, self._err, colour=False)
        self._chat = Chat(client, params, system, screen, interactive=terminal)
        self.out = self.err = ""

    def type(self, text: str) -> bool:
        done = self._chat.run(plain_lines(io.StringIO(text)))
        self.out, self.err = self._out.getvalue(), self._err.getvalue()
        for stream in (self._out, self._err):
            stream.seek(0)
            stream.truncate()
        return done

    def prompts(self) -> list[str]:
        """What the engine got, as text, since the last call."""
        requests: list[Request] = self._live.call(self._live.engine.requests.copy)
        self._live.call(self._live.engine.requests.clear)
        return [self._tokenizer.decode(request.prompt_ids, skip_special_tokens=True) for request in requests]


@pytest.fixture
def client(server: Live) -> Iterator[ChatClient]:
    with ChatClient(server.url, None) as client:
        yield client


@pytest.fixture
def session(client: ChatClient, server: Live, tokenizer: Tokenizer) -> Session:
    return Session(client, server, tokenizer)


@pytest.fixture
def at_terminal(client: ChatClient, server: Live, tokenizer: Tokenizer) -> Session:
    return Session(client, server, tokenizer, terminal=True)


def test_a_conversation(session: Session, server: Live) -> None:
    assert session.type("Hi\n\n  \nAnd\\\nyou?\n")
    assert session.out == f"{TEXT}\n{TEXT}\n"
    assert session.err == ""
    params = server.call(lambda: server.engine.requests[0].params)
    assert (params.max_tokens, params.seed) == (50, 7)
    first, second = session.prompts()
    assert first == "[INST] Hi [/INST]"
    assert second == f"[INST] Hi [/INST] {TEXT} [INST] And\nyou? [/INST]"


def test_reset(session: Session) -> None:
    assert session.type("Hi\n/reset\nAgain\n")
    assert session.prompts()[1] == "[INST] Again [/INST]"


def test_the_system_text(client: ChatClient, server: Live, tokenizer: Tokenizer) -> None:
    session = Session(client, server, tokenizer, system="Be brief.")
    assert session.type(
        "/system\nHi\n/system   Be   long. \n/system\nHi\n/reset\nHi\n/system ''\n/system\nHi\n/system \"\""
    )
    assert session.out == f"Be brief.\n{TEXT}\nBe   long.\n{TEXT}\n{TEXT}\nno system text\n{TEXT}\n"
    prompts = session.prompts()
    assert prompts[0].startswith("[INST] Be brief.")
    assert prompts[1].startswith("[INST] Be   long.")
    assert "brief" not in prompts[1]
    assert prompts[2].startswith("[INST] Be   long."), "a reset leaves it"
    assert "long" not in prompts[3]


def test_a_system_text_of_two_lines(session: Session) -> None:
    session.type("/system Be\\\nbrief.\n/system\n/system\\\nX\n/system\n")
    assert session.out == "Be\nbrief.\nX\n"


def test_help_and_quit(session: Session) -> None:
    assert session.type("/help\n/quit\nHi\n")
    assert session.out == f"{HELP}\n"
    assert session.prompts() == []
    for command in ("/system", "/history", "/reset", "/help", "/quit", "//"):
        assert command in HELP


def test_history(session: Session) -> None:
    session.type("Hi\n/system Be brief.\nYou\n/reset\n/history\n")
    session.type("Hi \\\nyou\n/history\n")
    assert session.out == f"{TEXT}\nsystem: Be brief.\nuser: Hi \nyou\nassistant: {TEXT}\n"


@pytest.mark.parametrize("typed", ["/", "/foo", "/systems x", "/Quit", "/usr/bin/python\\\nHi", "/quit/"])
def test_no_such_command(session: Session, typed: str) -> None:
    assert not session.type(f"{typed}\n")
    assert session.err.startswith(f"error: there is no {typed.split()[0].rstrip(chr(92))}; /help")
    assert session.err.count("\n") == 1
    assert session.prompts() == []


def test_a_text_that_begins_with_a_slash(session: Session) -> None:
    assert session.type("//quit now\n///\n")
    first, second = session.prompts()
    assert first == "[INST] /quit now [/INST]"
    assert second.endswith("[INST] // [/INST]")


def test_a_failed_message_is_taken_back(session: Session, server: Live) -> None:
    assert session.type("Hi\n")
    for number, shown in ((0, ""), (2, "Hello from\n")):
        server.call(partial(setattr, server.engine, "fail_at", number))
        assert not session.type("Lost\n")
        assert session.err == "error: The request failed inside the engine.\n"
        assert session.out == shown
    server.call(lambda: setattr(server.engine, "fail_at", None))
    session.prompts()
    session.type("And you?\n")
    assert session.prompts() == [f"[INST] Hi [/INST] {TEXT} [INST] And you? [/INST]"]


def test_a_conversation_over_the_context(session: Session) -> None:
    session.type("Hi\n" + "word " * 300 + "\n/history\nHi\n")
    assert session.err.count("\n") == 1
    assert "256 tokens" in session.err
    assert session.err.endswith("; /reset forgets the conversation\n")
    assert "word" not in session.out
    assert len(session.prompts()) == 2


def test_a_busy_server(session: Session, server: Live) -> None:
    server.call(lambda: setattr(server.engine, "max_waiting", 0))
    session.type("Hi\n")
    server.call(lambda: setattr(server.engine, "max_waiting", 100))
    assert session.err == "error: too many requests wait; try again in 3 s\n"


def test_an_escape_sequence_of_the_model(session: Session, server: Live, tokenizer: Tokenizer) -> None:
    evil = "a\x1b[31mb\x9b2J\x07c"
    tokens = tokenizer.encode(evil, add_special_tokens=False)
    server.call(lambda: setattr(server.engine, "script", lambda _: tokens))
    session.type("Hi\n/history\n")
    assert session.out == "a␛[31mb\ufffd2J␇c\nuser: Hi\nassistant: a␛[31mb\ufffd2J␇c\n"
    session.prompts()
    session.type("Hi\n")
    assert evil in session.prompts()[0], "what is remembered is what was said"


def test_tokens_are_counted_at_a_terminal(at_terminal: Session, server: Live) -> None:
    server.call(lambda: setattr(server.engine, "step_seconds", 0.01))
    at_terminal.type("Hi\n")
    answer, count, end = at_terminal.out.split("\n", 2)
    assert answer == TEXT
    words, rate, unit = count.rsplit(" ", 2)
    assert (words, unit) == ("7 tokens,", "tokens/s")
    assert 5 < float(rate) < 200, "a token takes 10 ms, and the connection's whims"
    assert end == "\n"


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        (Answer(), None),
        (Answer(num_tokens=1), "1 token"),
        (Answer(num_tokens=1, times=[5.0]), "1 token"),
        (Answer(num_tokens=2, times=[5.0, 5.0]), "2 tokens"),
        (Answer(num_tokens=9, times=[5.0, 5.5, 7.0], finish_reason="stop"), "9 tokens, 4.0 tokens/s"),
        (
            Answer(num_tokens=9, times=[5.0, 7.0], finish_reason="length"),
            "9 tokens, 4.0 tokens/s, ended by the token limit",
        ),
    ],
)
def test_how_tokens_are_counted(answer: Answer, count: str | None) -> None:
    assert answer.count() == count


def test_an_answer_that_is_cut_off_says_so(at_terminal: Session, server: Live, tokenizer: Tokenizer) -> None:
    long = tokenizer.encode("x" * 500, add_special_tokens=False)
    server.call(lambda: setattr(server.engine, "script", lambda _: long * 10))
    at_terminal.type("Hi\n")
    assert at_terminal.out.split("\n")[1].startswith("50 tokens, ")
    assert at_terminal.out.split("\n")[1].endswith(", ended by the token limit")


def test_an_empty_answer(at_terminal: Session, server: Live) -> None:
    server.call(lambda: setattr(server.engine, "script", lambda _: []))
    at_terminal.type("Hi\n")
    assert at_terminal.out == "1 token\n\n"


def test_changes_are_confirmed_at_a_terminal(at_terminal: Session) -> None:
    at_terminal.type('/system x\n/system ""\n/reset\n')
    assert at_terminal.out.split("\n")[:3] == [
        "the system text is set",
        "the system text is cleared",
        "the conversation is forgotten",
    ]


class Interrupting:
    """Lines, some of which are Ctrl-C."""

    def __init__(self, *lines: str | None) -> None:
        self._lines = iter(lines)
        self.num_read = 0

    def __call__(self, _: str) -> str:
        self.num_read += 1
        line = next(self._lines, "")
        if line is None:
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize(
    ("lines", "num_read"),
    [
        ([None, None], 2),
        ([None, "", None, "/help", None, None], 6),
        (["half\\", None, None], 3),
        (["/quit"], 1),
    ],
)
def test_ctrl_c_twice_in_a_row_leaves(client: ChatClient, server: Live, lines: list[str | None], num_read: int) -> None:
    out, typed = io.StringIO(), Interrupting(*lines)
    assert Chat(client, {}, "", Screen(out, out, colour=False), interactive=True).run(typed)
    assert typed.num_read == num_read
    assert server.call(lambda: server.engine.requests) == []


def test_ctrl_c_ends_a_script(client: ChatClient) -> None:
    out = io.StringIO()
    chat = Chat(client, {}, "", Screen(out, out, colour=False), interactive=False)
    with pytest.raises(KeyboardInterrupt):
        chat.run(Interrupting(None))
