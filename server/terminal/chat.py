"""`mixserve chat`: a conversation with a model behind a running server."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path

from server.terminal.client import ChatClient, Piece, Turn
from server.terminal.http import ClientError
from server.terminal.lines import Lines, plain_lines, read_message, typed_lines
from server.terminal.screen import Screen, discard_output

HELP = """\
/system [TEXT]  show the system text, or set it; /system "" clears it
/history        print the conversation so far
/reset          forget the conversation; the system text stays
/help           print this
/quit           leave; so does Ctrl-D
//TEXT          send a text that begins with a slash
A line that ends in a backslash goes on in the next. Ctrl-C stops an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Options of one chat."""

    url: str
    """Without `/v1`."""
    model: str | None
    """None: the first that the server lists."""
    api_key: str | None
    system: str
    """Empty: no system message."""
    params: Mapping[str, object]
    """Fields of every request, such as temperature."""
    history: Path
    colour: bool
    """Whether a terminal may be told to show notes dim."""


def run_chat(options: ChatOptions) -> int:
    """Chat until the user leaves; the exit code: 0, or 1 if something went wrong and nobody typed at a terminal.

    Raises ClientError when the server cannot be asked for its model.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    screen = Screen(sys.stdout, sys.stderr, colour=options.colour)
    with ChatClient(options.url, options.api_key) as client:
        model = options.model or client.first_model()
        chat = Chat(client, {"model": model, **options.params}, options.system, screen, interactive=interactive)
        if interactive:
            screen.note(f"{model} at {options.url}; /help lists the commands")
            with typed_lines(options.history) as lines, suppress(KeyboardInterrupt):
                chat.run(lines)
            return 0
        try:
            return 0 if chat.run(plain_lines(sys.stdin)) else 1
        except BrokenPipeError:
            discard_output()
            return 1


@dataclass
class Answer:
    """What has come of an answer."""

    parts: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    num_tokens: int | None = None
    times: list[float] = field(default_factory=list)
    """When each part and the end came, in seconds of a monotonic clock."""

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def add(self, piece: Piece) -> None:
        if piece.text:
            self.parts.append(piece.text)
        if piece.text or piece.finish_reason:
            self.times.append(time.monotonic())
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.num_tokens = piece.num_tokens or self.num_tokens

    def count(self) -> str | None:
        """Tokens, tokens/s from the first part to the end, and whether a limit ended it; None if uncounted."""
        if self.num_tokens is None:
            return None
        words = f"{self.num_tokens} token{'' if self.num_tokens == 1 else 's'}"
        seconds = self.times[-1] - self.times[0] if self.times else 0.0
        if seconds > 0:
            words += f", {(self.num_tokens - 1) / seconds:.1f} tokens/s"
        return words + (", ended by the token limit" if self.finish_reason == "length" else "")


class Chat:
    """One conversation. `interactive`: Ctrl-C stops an answer and is no end."""

    def __init__(
        self, client: ChatClient, params: Mapping[str, object], system: str, screen: Screen, *, interactive: bool
    ) -> None:
        self._client = client
        self._params = params
        self._system = system
        self._screen = screen
        self._interactive = interactive
        self._turns: list[Turn] = []
        self._failed = False

    def run(self, lines: Lines) -> bool:
        """Until the end of the input, /quit or a second Ctrl-C in a row; whether all went well."""
        interrupted = False
        while True:
            try:
                message = read_message(lines).rstrip()
            except EOFError:
                if self._interactive:
                    self._screen.line("")  # the cursor stands behind a prompt
                break
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                self._screen.line("")
                if interrupted:
                    break
                self._screen.note("Ctrl-C again or Ctrl-D leaves")
                interrupted = True
                continue
            interrupted = False
            if not self._handle(message):
                break
        return not self._failed

    def _handle(self, message: str) -> bool:
        """Carry out a command, or send a message; False to leave."""
        if not message.startswith("/"):
            if message.strip():
                self._ask(message)
            return True
        if message.startswith("//"):
            self._ask(message[1:])
            return True
        command, *rest = message.split(maxsplit=1)
        match command:
            case "/quit":
                return False
            case "/help":
                self._screen.line(HELP)
            case "/reset":
                self._turns.clear()
                self._tell("the conversation is forgotten")
            case "/system":
                self._set_system("".join(rest))
            case "/history":
                for turn in self._conversation():
                    self._screen.line(f"{turn['role']}: {turn['content']}")
            case _:
                self._complain(f"there is no {command}; /help lists the commands, // sends a text that begins with /")
        return True

    def _set_system(self, text: str) -> None:
        if text:
            self._system = "" if text in ('""', "''") else text
            self._tell("the system text is set" if self._system else "the system text is cleared")
        else:
            self._screen.line(self._system or "no system text")

    def _conversation(self) -> list[Turn]:
        system: list[Turn] = [{"role": "system", "content": self._system}] if self._system else []
        return system + self._turns

    def _ask(self, message: str) -> None:
        """Send `message` after the conversation and show the answer. Without an answer, neither is remembered."""
        question: Turn = {"role": "user", "content": message}
        answer = Answer()
        try:
            with closing(self._client.stream([*self._conversation(), question], self._params)) as pieces:
                for piece in pieces:
                    answer.add(piece)
                    self._screen.text(piece.text)
        except ClientError as error:
            words = str(error)
            if error.code == "context_length_exceeded" or "context" in words:  # not all servers have the code
                words = f"{words.rstrip('.')}; /reset forgets the conversation"
            self._complain(words)
            return
        except KeyboardInterrupt:
            if not self._interactive:
                raise
            self._screen.note("[stopped]")
            if not answer.parts:
                return
        else:
            self._screen.end_line()
            if self._screen.terminal and (count := answer.count()):
                self._screen.note(count)
        self._turns += [question, {"role": "assistant", "content": answer.text}]

    def _tell(self, text: str) -> None:
        if self._interactive:
            self._screen.note(text)

    def _complain(self, text: str) -> None:
        self._failed = True
        self._screen.error(text)
