"""A log handler that holds up nobody."""

from __future__ import annotations

import json
import logging
import queue
import threading
from typing import TextIO

_CAPACITY = 10_000
_CLOSE_SECONDS = 1.0


class BackgroundLines(logging.Handler):
    """Writes each message as a line, from a thread of its own.

    A reader of `stream` that stops reading costs lines, not answers: what does not fit into the queue is dropped, and
    the next line that is written tells how many that were.
    """

    def __init__(self, stream: TextIO, *, capacity: int = _CAPACITY) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(capacity)
        self._num_refused = 0
        """Lines that the queue did not take; the thread counts those that the stream did not take."""
        self._thread = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._num_refused += 1

    def close(self) -> None:
        """Wait for what is written, but not for ever. May be called again."""
        try:
            self._lines.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            pass
        else:
            self._thread.join(_CLOSE_SECONDS)
        super().close()

    def _write_all(self) -> None:
        num_failed = num_told = 0
        while (line := self._lines.get()) is not None:
            num_new = self._num_refused + num_failed - num_told
            if num_new:
                line += "\n" + json.dumps({"dropped_lines": num_new})
            try:
                self._stream.write(line + "\n")
                self._stream.flush()
                num_told += num_new
            except (OSError, ValueError):  # a full disk, a reader that is gone, a closed file
                num_failed += 1
