"""`mixserve experts`: what the experts of a running server do, in a terminal, as JSON or as a picture."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

from server.protocol.live import LiveEvent
from server.terminal.experts_client import first_routing, live_events
from server.terminal.experts_picture import check_pillow, write_picture
from server.terminal.experts_view import Canvas, lines
from server.terminal.http import ClientError
from server.terminal.screen import discard_output

_OTHER_SCREEN, _FIRST_SCREEN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsOptions:
    """Options of one `mixserve experts`."""

    url: str
    """Without `/v1`."""
    api_key: str | None
    form: Literal["live", "once", "json"] | Path
    """A path: a picture."""
    since_start: bool
    """Not of the latest steps, but of all."""
    colour: bool
    """Whether a terminal may be told to show colours."""
    dumb: bool
    """Whether the terminal does no more than write."""


def run_experts(options: ExpertsOptions) -> int:
    """The exit code. Raises ClientError; so ends every live view that Ctrl-C does not end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    terminal = sys.stdout.isatty() and not options.dumb
    try:
        if options.form == "live" and terminal:
            _show_live(options)
        else:
            _show_once(options, colour=options.colour and terminal)
        sys.stdout.flush()
    except BrokenPipeError:
        discard_output()
        return 1
    return 0


def _show_once(options: ExpertsOptions, *, colour: bool) -> None:
    if isinstance(options.form, Path):
        check_pillow()
    event = first_routing(options.url, options.api_key)
    if options.form == "json":
        print(json.dumps(event))
        return
    _check(event)
    if isinstance(options.form, Path):
        write_picture(event, options.form, since_start=options.since_start)
        print(f"Wrote {options.form}.")
    else:
        height = shutil.get_terminal_size().lines if sys.stdout.isatty() else sys.maxsize
        print("\n".join(_frame(event, options, colour=colour, height=height)))


def _show_live(options: ExpertsOptions) -> None:
    """Until Ctrl-C; the last frame stays behind."""
    frame: list[str] = []
    try:
        with (
            suppress(KeyboardInterrupt),
            closing(live_events(options.url, options.api_key)) as events,
            _other_screen(sys.stdout) as draw,
        ):
            for event in events:
                _check(event)
                height = shutil.get_terminal_size().lines
                frame = _frame(event, options, colour=options.colour, height=height)
                draw(frame[:height])
    finally:
        if frame:
            print("\n".join(frame))


def _frame(event: LiveEvent, options: ExpertsOptions, *, colour: bool, height: int) -> list[str]:
    canvas = Canvas(shutil.get_terminal_size().columns, height, colour)
    return lines(event, canvas, since_start=options.since_start)


def _check(event: LiveEvent) -> None:
    """Raises ClientError when there is nothing to look at."""
    if event["health"]["status"] == "dead":
        raise ClientError(event["health"]["message"] or "the engine is dead")
    if not event["model"]["record_routing"]:
        raise ClientError("this server does not record routing (--no-record-routing)")


@contextmanager
def _other_screen(out: TextIO) -> Iterator[Callable[[Sequence[str]], None]]:
    """Gives a function that draws over what was drawn before; then the terminal is as it was."""

    def draw(frame: Sequence[str]) -> None:
        out.write(_HOME + "\r\n".join(f"{_REST_OF_LINE}{line}" for line in frame) + _REST_OF_SCREEN)
        out.flush()

    out.write(_OTHER_SCREEN)
    try:
        yield draw
    finally:
        out.write(_FIRST_SCREEN)
        out.flush()
