"""The log's thread: a slow reader of the log costs lines, not answers."""

from __future__ import annotations

import io
import json
import logging
import threading
import time

from server.edge.log_lines import BackgroundLines


class Slow(io.StringIO):
    """Writes nothing before `resume`."""

    def __init__(self) -> None:
        super().__init__()
        self.resume = threading.Event()
        self.waits = threading.Event()

    def write(self, text: str) -> int:
        self.waits.set()
        assert self.resume.wait(10)
        return super().write(text)


class Full(io.StringIO):
    """A disk that is full for the first two lines."""

    failures = 2

    def write(self, text: str) -> int:
        if self.failures:
            self.failures -= 1
            raise OSError(28, "No space left on device")
        return super().write(text)


def emit(handler: logging.Handler, *texts: str) -> None:
    for text in texts:
        handler.handle(logging.LogRecord("x", logging.INFO, "", 0, "%s", (text,), None))


def test_lines_come_out_in_order() -> None:
    stream = io.StringIO()
    handler = BackgroundLines(stream)
    texts = [str(number) for number in range(1000)]
    emit(handler, *texts)
    handler.close()
    assert stream.getvalue().splitlines() == texts


def test_a_stream_that_stalls_holds_up_nobody_and_loses_are_counted() -> None:
    stream = Slow()
    handler = BackgroundLines(stream, capacity=3)
    emit(handler, "first")
    assert stream.waits.wait(5)
    start = time.monotonic()
    emit(handler, *"abcdefgh")
    assert time.monotonic() - start < 1
    stream.resume.set()
    deadline = time.monotonic() + 5
    while "c" not in stream.getvalue():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    emit(handler, "last")
    handler.close()
    lines = stream.getvalue().splitlines()
    assert [line for line in lines if line.isalpha()] == ["first", "a", "b", "c", "last"]
    assert [json.loads(line) for line in lines if not line.isalpha()] == [{"dropped_lines": 5}]


def test_a_full_disk_is_survived() -> None:
    stream = Full()
    handler = BackgroundLines(stream)
    emit(handler, "a", "b", "c")
    handler.close()
    assert stream.getvalue().splitlines() == ["c", '{"dropped_lines": 2}']


def test_a_stream_that_is_closed_is_survived() -> None:
    stream = io.StringIO()
    handler = BackgroundLines(stream)
    stream.close()
    emit(handler, "a")
    handler.close()


def test_leaving_does_not_wait_for_ever() -> None:
    stream = Slow()
    handler = BackgroundLines(stream, capacity=1)
    emit(handler, "a", "b", "c")
    start = time.monotonic()
    handler.close()
    assert time.monotonic() - start < 5
    stream.resume.set()
