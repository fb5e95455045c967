"""Setting: what a run is about. Report: what it found, in a file that is written again with every row, so that a run
that is cut off was not in vain, and another one can go on where it ended.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PART_SECONDS = 7.0 * 60
"""After so long a part begins nothing new."""
GRACE_SECONDS = 50.0
"""What it has begun may take so much longer."""
BUILD_SECONDS = 60.0
"""How long a model takes at most from its configuration to its first step: a guess."""


@dataclass(frozen=True)
class Setting:
    device: torch.device
    tiny: bool
    out: Path
    wheels: Path | None = None
    """A folder of wheels to install where a part misses packages."""


class Report:
    """One JSON file of a run: its machine, and for each part single values and tables of rows."""

    def __init__(self, path: Path, head: dict[str, Any], *, resume: bool = False) -> None:
        """`resume`: begin with what the file has. Raises ValueError if that is of another machine or size."""
        self._path = path
        self._content: dict[str, Any] = {**head, "parts": {}}
        if resume and path.exists():
            earlier = json.loads(path.read_text())
            if any(earlier.get(name) != value for name, value in head.items()):
                raise ValueError(f"{path} is of another machine or size: give another folder, or leave out --resume")
            self._content["parts"] = earlier["parts"]

    def is_complete(self, name: str) -> bool:
        return bool(self._parts.get(name, {}).get("complete"))

    def has_failed(self, name: str) -> bool:
        return "error" in self._parts.get(name, {})

    def part(self, name: str, *, anew: bool = True) -> Part:
        """`anew`: without the rows that it had."""
        own = {} if anew else self._parts.get(name, {})
        for key in ("complete", "error", "left_out", "seconds"):
            own.pop(key, None)
        self._parts[name] = own
        return Part(self, own)

    def write(self) -> None:
        """In one move: a run that is cut off while it writes leaves the file as it was."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(self._content, indent=2) + "\n")
        new.replace(self._path)

    @property
    def failed(self) -> list[str]:
        return [name for name in self._parts if self.has_failed(name)]

    @property
    def incomplete(self) -> list[str]:
        """Parts that have begun, have not failed, and were not finished."""
        return [name for name in self._parts if not self.is_complete(name) and not self.has_failed(name)]

    @property
    def _parts(self) -> dict[str, dict[str, Any]]:
        parts: dict[str, dict[str, Any]] = self._content["parts"]
        return parts


class Part:
    """What one part reports, and its time."""

    def __init__(self, report: Report, content: dict[str, Any]) -> None:
        self._report = report
        self._content = content
        self._start = time.perf_counter()
        self._out_of_time = False

    def set(self, **values: Any) -> None:
        self._content |= values
        self._report.write()

    def row(self, table: str, **values: Any) -> None:
        """Print a row and add it to a table."""
        self._content.setdefault(table, []).append(values)
        print(f"{table}: " + "  ".join(f"{key} {_text(value)}" for key, value in values.items()), flush=True)
        self._report.write()

    def rows(self, table: str, **keys: Any) -> list[dict[str, Any]]:
        """The rows of a table that have these values, those of the run that this one resumes among them."""
        return [row for row in self._content.get(table, []) if keys.items() <= row.items()]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def seconds_left(self) -> float:
        """Until nothing new begins; below 0 after that."""
        return PART_SECONDS - self.seconds

    @property
    def most_seconds(self) -> float:
        """That what begins now may take."""
        return max(0.0, self.seconds_left) + GRACE_SECONDS

    def has_time(self, what: str, *, seconds: float = 0.0) -> bool:
        """Whether there is time to begin `what`, which takes `seconds` before it has anything to tell; if not, the
        report says that it was left out."""
        if self.seconds_left > seconds:
            return True
        self._out_of_time = True
        self.leave_out(what, "no time")
        return False

    def leave_out(self, what: str, reason: str) -> None:
        left_out = self._content.setdefault("left_out", [])
        left_out.append(f"{what}: {reason}")
        print(f"left out: {left_out[-1]}", flush=True)

    def end(self, error: str | None = None) -> None:
        """A part that left something out for want of time, or failed, is not complete: it can be resumed."""
        if error is not None:
            self.set(error=error)
        self.set(seconds=round(self.seconds, 3), complete=error is None and not self._out_of_time)


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
