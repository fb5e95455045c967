"""The oldest Triton that must compile the kernels, in a folder of its own beside the one that is installed.

`python -m tests.engine.kernels.older` installs it, as `make test` does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.interpreter import missing_triton

VERSION = "3.6.0"
FOLDER = Path(sys.prefix) / f"triton-{VERSION}"
REQUIRE = "MIXSERVE_REQUIRE_TRITON"
"""With this environment variable, as `.ci/run` has it, that Triton must be here."""


def missing_older() -> str | None:
    """What is not there, and how to get it; None when it is."""
    if (FOLDER / "triton" / "__init__.py").exists():
        return None
    return f"Triton {VERSION} is not installed (python -m tests.engine.kernels.older)"


def install() -> None:
    """A download of 190 MB, which becomes 640. Does nothing where it is there already, or where there is no Triton."""
    if missing_older() and not missing_triton():
        print(f"Installing Triton {VERSION} into {FOLDER} ...", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--upgrade", "--no-deps"]
        subprocess.run([*pip, "--target", FOLDER, f"triton=={VERSION}"], check=True)


if __name__ == "__main__":
    install()
