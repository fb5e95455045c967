"""What reaches the terminal."""

from __future__ import annotations

import io
import unicodedata

import pytest

from server.terminal.screen import Screen, printable


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_control_character_gets_through() -> None:
    every = "".join(map(chr, range(0x3000)))
    shown = printable(every)
    assert {char for char in shown if unicodedata.category(char) == "Cc"} == {"\t", "\n"}
    assert shown[-0x2000:] == every[-0x2000:]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", "␛[31mred␛]0;title␇"),
        ("\x9b2J\x7f\x00", "\ufffd2J␡␀"),
        ("a\r\nb\rc", "a\nbc"),
        ("tab\té\U0001f600", "tab\té\U0001f600"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_every_way_out_is_cleaned() -> None:
    out, err = Tty(), io.StringIO()
    screen = Screen(out, err, colour=False)
    for write in (screen.text, screen.line, screen.note, screen.error):
        write("\x1b[2J\x9b2J")
    assert "\x1b" not in out.getvalue() + err.getvalue()
    assert "\x9b" not in out.getvalue() + err.getvalue()


def test_a_line_starts_on_its_own() -> None:
    out, err = io.StringIO(), io.StringIO()
    screen = Screen(out, err, colour=True)
    screen.text("Hel")
    screen.text("lo")
    screen.text("")
    screen.note("one")
    screen.text("whole\n")
    screen.line("two")
    screen.text("broken")
    screen.error("three")
    screen.end_line()
    assert out.getvalue() == "Hello\none\nwhole\ntwo\nbroken\n"
    assert err.getvalue() == "error: three\n"


@pytest.mark.parametrize(
    ("out", "colour", "dim"), [(Tty(), True, True), (Tty(), False, False), (io.StringIO(), True, False)]
)
def test_only_a_terminal_is_told_to_dim(out: io.StringIO, colour: bool, dim: bool) -> None:
    Screen(out, io.StringIO(), colour=colour).note("x")
    assert out.getvalue() == ("\x1b[2mx\x1b[0m\n" if dim else "x\n")
