"""Where there is no Chromium, these tests are left out loudly, or fail where they must run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.browser import installed

ROOT = Path(__file__).parents[3]
CASE = "tests/e2e/browser/test_loading.py::test_it_loads"


def run_without_chromium(folder: Path, *, required: bool) -> subprocess.CompletedProcess[str]:
    """One test, with a PATH that leads nowhere."""
    environment = {key: value for key, value in os.environ.items() if key != installed.REQUIRE}
    environment |= {"PATH": str(folder)} | ({installed.REQUIRE: "1"} if required else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASE]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_left_out_and_said(tmp_path: Path) -> None:
    result = run_without_chromium(tmp_path, required=False)
    assert result.returncode == 0, result.stdout
    assert "1 skipped" in result.stdout
    assert "!!! THE TESTS IN A BROWSER WERE LEFT OUT !!!" in result.stdout
    assert "apt-get install chromium" in result.stdout


def test_a_failure_where_it_is_required(tmp_path: Path) -> None:
    result = run_without_chromium(tmp_path, required=True)
    assert result.returncode == 1, result.stdout
    assert "there is no `chromium`" in result.stdout
    assert "LEFT OUT" not in result.stdout


def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "google-chrome").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(installed, "FOLDER", tmp_path)
    assert "npm ci" in str(installed.missing_browser())
    installed.axe_core().parent.mkdir(parents=True)
    installed.axe_core().touch()
    assert installed.missing_browser() is None
