"""Packages that the engine does without and a part needs: of this machine, or from wheels that were carried to it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from tests.bench.card.report import Part, Setting

ROOT = Path(__file__).parents[3]


@contextmanager
def environment_with(setting: Setting, part: Part, names: Iterable[str]) -> Iterator[dict[str, str] | None]:
    """The environment in which a Python process finds this checkout and the modules `names`. None if some are missing
    from this machine and the wheels: the part says which."""
    missing = [name for name in names if find_spec(name) is None]
    with tempfile.TemporaryDirectory() as site:
        if missing and setting.wheels is not None:
            install(setting.wheels, Path(site))
            missing = [name for name in missing if PathFinder.find_spec(name, [site]) is None]
        if missing:
            part.leave_out(", ".join(missing), "not installed, and not among --wheels")
            yield None
            return
        paths = [str(ROOT), site, *filter(None, [os.environ.get("PYTHONPATH")])]
        yield {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}


def install(wheels: Path, site: Path) -> None:
    """All the wheels of a folder, and nothing from anywhere else. Raises RuntimeError."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise RuntimeError(f"{wheels} has no wheels")
    options = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir")
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(site), *files]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the wheels of {wheels} cannot be installed: {result.stderr.strip()}")
