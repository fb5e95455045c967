"""Setting: what a run is about. Report: what it found, in a file that is written again with every row, so that a run
that is cut off was not in vain.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PART_SECONDS = 7.0 * 60
"""After so long a part begins nothing new. What it has begun may take another minute."""


@dataclass(frozen=True)
class Setting:
    device: torch.device
    tiny: bool
    out: Path


class Report:
    """One JSON file of a run: its machine, and for each part single values and tables of rows."""

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self._path = path
        self._content: dict[str, Any] = {**head, "parts": {}}

    def part(self, name: str) -> Part:
        own: dict[str, Any] = {}
        self._content["parts"][name] = own
        return Part(self, own)

    def write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(self._content, indent=2) + "\n")

    @property
    def failed(self) -> list[str]:
        return [name for name, part in self._content["parts"].items() if "error" in part]


class Part:
    """What one part reports, and its time."""

    def __init__(self, report: Report, content: dict[str, Any]) -> None:
        self._report = report
        self._content = content
        self._start = time.perf_counter()

    def set(self, **values: Any) -> None:
        self._content |= values
        self._report.write()

    def row(self, table: str, **values: Any) -> None:
        """Print a row and add it to a table."""
        self._content.setdefault(table, []).append(values)
        print(f"{table}: " + "  ".join(f"{key} {_text(value)}" for key, value in values.items()), flush=True)
        self._report.write()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def has_time(self, what: str) -> bool:
        """Whether there is time to begin `what`; if not, the report says that it was left out."""
        if self.seconds < PART_SECONDS:
            return True
        left_out = self._content.setdefault("left_out", [])
        if not left_out:
            print(f"no time left: {what} and what follows is left out", flush=True)
        left_out.append(what)
        return False


def _text(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
