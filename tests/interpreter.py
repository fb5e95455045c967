"""Tests marked `interpreter`: Triton's kernels run on the CPU, in a process of their own.

Triton looks at TRITON_INTERPRET while it is imported, and can compile nothing from then on. So the marked tests of a
file run together in a child, and their outcomes are reported here, each as if it had run in this process. To debug
one, set TRITON_INTERPRET=1: then it does run in this process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
VARIABLE = "TRITON_INTERPRET"


class Outcome(NamedTuple):
    outcome: str
    """passed, failed or skipped."""
    text: str


class Child:
    """The tests of one file, run when the first of them is due."""

    def __init__(self, nodeids: list[str]) -> None:
        self._nodeids = nodeids

    def outcome(self, nodeid: str) -> Outcome:
        outcomes, output = self._results
        return outcomes.get(nodeid, Outcome("failed", f"It did not run under the interpreter.\n{output}"))

    @cached_property
    def _results(self) -> tuple[dict[str, Outcome], str]:
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = Path(folder, "asked"), Path(folder, "answered")
            asked.write_text("\n".join(self._nodeids))
            result = subprocess.run(
                [sys.executable, "-m", "tests.interpreter", asked, answered],
                cwd=ROOT,
                env=os.environ | {VARIABLE: "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            outcomes = json.loads(answered.read_text()) if answered.exists() else {}
            return {nodeid: Outcome(*outcome) for nodeid, outcome in outcomes.items()}, result.stdout


class InterpretedItem(pytest.Item):
    """Stands for a test that runs in a child."""

    def __init__(self, *, child: Child, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._child = child

    def runtest(self) -> None:
        outcome, text = self._child.outcome(self.nodeid)
        if outcome == "skipped":
            pytest.skip(text)
        if outcome == "failed":
            pytest.fail(text, pytrace=False)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        return self.path, None, self.name


def interpreted(items: Iterable[pytest.Item]) -> Iterator[pytest.Item]:
    """The same tests; those that are marked, by children."""
    if os.environ.get(VARIABLE) == "1":
        yield from items
        return
    for _, group in groupby(items, key=lambda item: item.path):
        tests = list(group)
        child = Child([item.nodeid for item in tests if item.get_closest_marker("interpreter")])
        for item in tests:
            if item.get_closest_marker("interpreter"):
                assert item.parent is not None
                yield InterpretedItem.from_parent(item.parent, name=item.name, child=child)
            else:
                yield item


class LeftOut(pytest.File):
    """A file whose tests cannot be imported without Triton."""

    def collect(self) -> Iterator[pytest.Item]:
        pytest.skip(str(missing_triton()))


class _Recorder:
    """A plugin of the child: the worst outcome of each test's phases."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Outcome] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            text += "".join(f"\n--- {name}\n{content}" for name, content in report.sections)
            self.outcomes[report.nodeid] = Outcome(report.outcome, text)


def main(asked: str, answered: str) -> None:
    recorder = _Recorder()
    pytest.main(["-p", "no:cacheprovider", f"@{asked}"], plugins=[recorder])
    Path(answered).write_text(json.dumps(recorder.outcomes))


def missing_triton() -> str | None:
    """Why no kernel can be tested here, or None."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed (there are wheels for Linux only)"


if __name__ == "__main__":
    main(*sys.argv[1:])
