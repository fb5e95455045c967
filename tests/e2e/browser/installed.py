"""The browser and axe-core: whether they are here, and how to get them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.e2e.node_client import FOLDER

REQUIRE = "MIXSERVE_REQUIRE_BROWSER"
"""With this environment variable, as `.ci/run` has it, both must be here."""

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str | None:
    return next((path for path in map(shutil.which, _NAMES) if path is not None), None)


def axe_core() -> Path:
    """Deque's accessibility rules, as one script (MPL-2.0)."""
    return FOLDER / "node_modules" / "axe-core" / "axe.min.js"


def missing_browser() -> str | None:
    """What is not there, and how to get it; None when the tests can run."""
    if find_chromium() is None:
        return "there is no `chromium` (Debian: apt-get install chromium)"
    if not axe_core().exists():
        return "axe-core is not installed (npm ci --prefix tests/e2e/node)"
    return None


def launch_arguments() -> list[str]:
    """Nothing is asked of the outside. Chromium's sandbox does not work for root."""
    quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    return quiet + (["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])
