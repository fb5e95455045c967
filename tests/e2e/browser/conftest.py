"""One browser for the folder; without it the tests are left out, which the end of the run says loudly."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect, sync_playwright

from engine.text import Tokenizer
from tests.e2e.browser.installed import REQUIRE, find_chromium, launch_arguments, missing_browser
from tests.e2e.browser.watched import Pages
from tests.e2e.running import Server, running_server
from tests.server.conftest import MIXTRAL
from tests.tiny import TINY_MIXTRAL, write_tiny_mixtral
from tests.tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

_FAILED = pytest.StashKey[bool]()
_PATIENCE_MS = 15_000
"""For what the page shows once a second, on a machine that others hold up."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    missing = missing_browser()
    if missing is not None and REQUIRE not in os.environ:
        pytest.skip(missing)
    assert missing is None, missing
    expect.set_options(timeout=_PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=launch_arguments())
        yield browser
        browser.close()


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    """For a test's own servers: they outlive its pages."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def pages(browser: Browser, tmp_path: Path, request: pytest.FixtureRequest, servers: ExitStack) -> Iterator[Pages]:
    """For opening pages. On a failure, what their consoles say is printed and their pictures are in `tmp_path`."""
    del servers  # only to end before them
    pages = Pages(browser, tmp_path, _PATIENCE_MS)
    yield pages
    pages.close(failed=request.node.stash.get(_FAILED, True), say=print)


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral of 3 layers with 8 experts. Its answers are bytes: some text, some no UTF-8."""
    folder = tmp_path_factory.mktemp("experts")
    shape = replace(TINY_MIXTRAL, num_layers=3, num_experts=8, vocab_size=VOCAB_SIZE, max_position_embeddings=2048)
    write_tiny_mixtral(folder, shape, eos_token_ids=(257,), seed=1)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="package")
def server(browser: Browser, checkpoint: Path) -> Iterator[Server]:
    del browser  # no server is started where there is none
    with running_server(str(checkpoint), "--served-model-name", "tiny", "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    """Mixtral's own, for servers with a fake engine."""
    return Tokenizer.load(MIXTRAL)
