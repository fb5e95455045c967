"""Fixtures for the whole suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checked_responses import checked_responses
from tests.e2e.browser.installed import missing_browser
from tests.e2e.node_client import missing_node
from tests.engine.kernels.older import VERSION as OLDER_TRITON
from tests.engine.kernels.older import missing_older
from tests.interpreter import LeftOut, interpreted, missing_triton

SERVED = [Path(__file__).parent / "server", Path(__file__).parent / "e2e"]
"""Folders whose tests talk to a server of ours."""

TIMED = (
    *("bench/test_layer_cost", "e2e/test_overload", "e2e/test_stalls", "server/routes/test_experts"),
    *(f"server/test_{name}" for name in ("experts", "large_bodies", "overload")),
    *(f"server/edge/test_{name}" for name in ("body", "connection", "log_lines")),
    *("engine/test_client_lifetime", "engine/test_process", "engine/grammar/test_checker"),
)
"""Files whose tests bound a time by a second or two, or less. The machine may be held up by others for as long: what
fails there is tried twice more, and what is really too slow fails every time."""

WITH_TRITON = ("engine/kernels/test_", "engine/backends/test_cuda", "bench/test_card_kernels")
"""Files that import Triton."""

# Before torch is loaded: threads that spin while a server under test needs their core make everything ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks a hub but the loopback one it starts itself


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """The demo model where the server keeps it, built on first use (a download of 93 MB and half a minute)."""
    from engine.demo import demo_model
    from server.cli import cache_dir

    return demo_model(cache_dir(os.environ), progress=False)


@pytest.fixture(scope="session")
def wrong_responses() -> Iterator[list[str]]:
    """Responses that tests/shapes.py does not allow, in the order they came in."""
    with checked_responses() as wrong:
        yield wrong
        assert wrong == [], "a wrong response after the last test"


@pytest.fixture(autouse=True)
def _every_response_is_as_it_should_be(request: pytest.FixtureRequest, wrong_responses: list[str]) -> Iterator[None]:
    yield
    found = wrong_responses.copy()
    wrong_responses.clear()
    if any(request.path.is_relative_to(folder) for folder in SERVED):  # others talk to a hub
        assert not found, "\n".join(found)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.File | None:
    """Files that cannot even be imported are left out whole."""
    name = module_path.relative_to(Path(__file__).parent).as_posix()
    if name.startswith(WITH_TRITON) and missing_triton():
        return LeftOut.from_parent(parent, path=module_path)
    return None


@pytest.hookimpl(trylast=True)  # when it is settled which tests run
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = interpreted(items)
    for item in items:
        if item.path.relative_to(Path(__file__).parent).as_posix().startswith(TIMED):
            item.add_marker(pytest.mark.flaky(reruns=2))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    for what, name, why in (
        ("TESTS WITH THE NODE CLIENT", "test_node_client", f"tests/e2e/node: {missing_node()}"),
        ("TESTS IN A BROWSER", "e2e/browser", missing_browser()),
        ("TESTS OF THE GPU KERNELS", "engine/kernels", missing_triton()),
        (f"COMPILE GATES OF TRITON {OLDER_TRITON}", "test_older_triton", missing_older()),
    ):
        if why and any(name in report.nodeid for report in skipped):
            terminalreporter.write_sep("!", f"THE {what} WERE LEFT OUT", yellow=True, bold=True)
            terminalreporter.write_line(why, yellow=True, bold=True)
