"""Tests that run in a child are reported as if they had run here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreter import VARIABLE, Child

ROOT = Path(__file__).parent.parent
SAMPLE = "tests/interpreter_sample.py"


def run_sample(*arguments: str, **environ: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE} | environ
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return result.stdout + result.stderr


def test_every_outcome() -> None:
    output = run_sample(SAMPLE, "-m", "not slow")
    assert "3 failed, 3 passed, 1 skipped, 1 deselected" in output
    assert "assert (1 + 1) == 3" in output
    assert "printed before" in output
    assert "for a reason" in output
    assert "ValueError: broken fixture" in output
    assert "ValueError: broken afterwards" in output


def test_one_test_by_name() -> None:
    output = run_sample(f"{SAMPLE}::test_passes[a b]")
    assert "1 passed" in output


def test_without_a_child() -> None:
    output = run_sample(SAMPLE, "-m", "not slow", **{VARIABLE: "1"})
    assert "1 failed, 4 passed, 1 skipped, 1 deselected, 2 errors" in output


def test_a_child_that_dies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    assert Child(["a"]).outcome("a").outcome == "failed"


def test_a_test_that_the_child_does_not_know() -> None:
    outcome, text = Child([f"{SAMPLE}::test_unknown"]).outcome(f"{SAMPLE}::test_unknown")
    assert outcome == "failed"
    assert "not found" in text
