"""Every compile gate again, with the oldest Triton that must work.

Without it they are left out, which the end of the run says loudly.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.kernels.older import FOLDER, REQUIRE, VERSION, missing_older

ROOT = Path(__file__).parents[3]
GATES = sorted(Path(__file__).parent.glob("test_compile_*.py"))

pytestmark = pytest.mark.skipif(missing_older() is not None and REQUIRE not in os.environ, reason=str(missing_older()))


def run_python(*arguments: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_version() -> None:
    assert missing_older() is None, missing_older()
    assert run_python("-c", "import triton; print(triton.__version__)").strip() == VERSION


@pytest.mark.parametrize("gates", GATES, ids=lambda path: path.stem)
def test_compile_gates(gates: Path) -> None:
    assert missing_older() is None, missing_older()
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", gates)
