"""Server-sent events from the parts in which a body comes."""

from __future__ import annotations


class EventReader:
    """Puts events together: wherever the parts are cut, `feed` gives the data of those that are whole by now."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[bytes]:
        """The data of each event that ends in `part`. Comments, and fields other than `data`, are left out."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
