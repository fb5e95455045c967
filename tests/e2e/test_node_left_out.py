"""Where there is no Node, the tests that need it are left out loudly, or fail where they must run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import node_client

ROOT = Path(__file__).parents[2]
CASE = "tests/e2e/conformance/test_node_client.py::test_a_server_whose_engine_dies"


def run_without_node(folder: Path, *, required: bool) -> subprocess.CompletedProcess[str]:
    """One test of the Node client, with a PATH that leads nowhere."""
    environment = {key: value for key, value in os.environ.items() if key != node_client.REQUIRE}
    environment |= {"PATH": str(folder)} | ({node_client.REQUIRE: "1"} if required else {})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", CASE]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_left_out_and_said(tmp_path: Path) -> None:
    result = run_without_node(tmp_path, required=False)
    assert result.returncode == 0, result.stdout
    assert "1 skipped" in result.stdout
    assert "!!! THE TESTS WITH THE NODE CLIENT WERE LEFT OUT !!!" in result.stdout
    assert "apt-get install nodejs npm" in result.stdout


def test_a_failure_where_it_is_required(tmp_path: Path) -> None:
    result = run_without_node(tmp_path, required=True)
    assert result.returncode == 1, result.stdout
    assert "there is no `node`" in result.stdout
    assert "LEFT OUT" not in result.stdout


def test_a_client_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = tmp_path / "node"
    node.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(node_client, "FOLDER", tmp_path)
    assert "npm ci" in str(node_client.missing_node())
    package = tmp_path / "node_modules" / "openai" / "package.json"
    package.parent.mkdir(parents=True)
    package.write_text(json.dumps({}))
    assert node_client.missing_node() is None
