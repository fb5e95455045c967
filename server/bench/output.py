"""Files that a benchmark writes at its end."""

from __future__ import annotations

import json
import os
from pathlib import Path

from server.bench.errors import BenchError


def check_writable(path: Path) -> None:
    """Raise BenchError now, rather than after minutes of work, if `path` could not be written."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise BenchError(f"cannot write {path}")


def write_text(path: Path, text: str) -> None:
    """Raises BenchError."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write {path}: {error.strerror}") from None


def write_json(path: Path, value: object) -> None:
    """Raises BenchError."""
    write_text(path, json.dumps(value, indent=2) + "\n")
