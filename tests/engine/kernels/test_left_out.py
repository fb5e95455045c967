"""Without Triton, or the older one, the tests that need it are left out loudly, or fail where they must run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.engine.kernels.older import REQUIRE

ROOT = Path(__file__).parents[3]
NO_TRITON = "sys.modules['triton'] = None"
NO_OLDER = "from tests.engine.kernels import older; older.FOLDER = Path('nowhere')"


def run_without(what: str, file: str, *, required: bool = False) -> tuple[int, str]:
    """The exit status and output of pytest over a file beside this one."""
    environment = {key: value for key, value in os.environ.items() if key != REQUIRE}
    environment |= {REQUIRE: "1"} if required else {}
    start = "sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', sys.argv[1]]))"
    code = f"import sys; from pathlib import Path; import pytest; {what}; {start}"
    command = [sys.executable, "-c", code, f"tests/engine/kernels/{file}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    return result.returncode, result.stdout


def test_no_triton() -> None:
    status, output = run_without(NO_TRITON, "test_rows.py")
    assert status == 5, output  # nothing was collected
    assert "!!! THE TESTS OF THE GPU KERNELS WERE LEFT OUT !!!" in output
    assert "Triton is not installed" in output


def test_no_older_triton() -> None:
    status, output = run_without(NO_OLDER, "test_older_triton.py")
    assert status == 0, output
    assert "!!! THE COMPILE GATES OF TRITON 3.6.0 WERE LEFT OUT !!!" in output
    assert "python -m tests.engine.kernels.older" in output


def test_a_failure_where_it_is_required() -> None:
    status, output = run_without(NO_OLDER, "test_older_triton.py", required=True)
    assert status == 1, output
    assert "Triton 3.6.0 is not installed" in output
    assert "LEFT OUT" not in output
