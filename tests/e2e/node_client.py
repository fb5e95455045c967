"""The official Node client: whether it is here, and how its cases in tests/e2e/node are run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "node"
REQUIRE = "MIXSERVE_REQUIRE_NODE"
"""With this environment variable, as `.ci/run` has it, Node must be here."""


def missing_node() -> str | None:
    """What is not there, and how to get it; None when the cases can run."""
    if shutil.which("node") is None:
        return "there is no `node` (Debian: apt-get install nodejs npm)"
    if not (FOLDER / "node_modules" / "openai" / "package.json").exists():
        return "the client is not installed (npm ci --prefix tests/e2e/node)"
    return None


def run_cases(
    script: str, url: str, *, keys: Sequence[str] = (), started: Callable[[], None] = lambda: None
) -> Iterator[dict[str, Any]]:
    """What each case of `script` prints. `started` is called when it says that its stream runs."""
    environment = os.environ | {"MIXSERVE_URL": url, "MIXSERVE_KEYS": " ".join(keys)}
    with subprocess.Popen(["node", script], cwd=FOLDER, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                result = json.loads(line)
                if "event" in result:
                    started()
                else:
                    yield result
            assert process.wait(10) == 0
        finally:
            process.kill()
