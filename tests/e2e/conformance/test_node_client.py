"""The official Node client: each case of tests/e2e/node is a result of its own.

Without Node or the client's package they are left out, which the end of the run says loudly.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checked_responses import check_response
from tests.e2e.conformance.asking import MODEL
from tests.e2e.conformance.conftest import KEYS
from tests.e2e.node_client import REQUIRE, missing_node, run_cases
from tests.e2e.running import Server, running_server

pytestmark = pytest.mark.skipif(missing_node() is not None and REQUIRE not in os.environ, reason=str(missing_node()))


@pytest.fixture(autouse=True)
def _node_is_here() -> None:
    assert missing_node() is None


def check_cases(results: Iterator[dict[str, Any]], subtests: pytest.Subtests, *, num_cases: int) -> None:
    names = []
    for result in results:
        names.append(result["name"])
        with subtests.test(result["name"]):
            for answer in result["responses"]:
                content = answer["body"].encode()
                check_response(answer["path"], answer["status"], answer["headers"], content, whole=answer["whole"])
            assert result["error"] is None, result["error"]
    assert len(names) == len(set(names)) == num_cases


def test_an_open_server(server: Server, subtests: pytest.Subtests) -> None:
    check_cases(run_cases("open.mjs", server.url), subtests, num_cases=70)


def test_a_server_with_keys(keyed_server: Server, subtests: pytest.Subtests) -> None:
    check_cases(run_cases("keyed.mjs", keyed_server.url, keys=KEYS), subtests, num_cases=6)


def test_a_server_whose_engine_dies(long_checkpoint: Path, subtests: pytest.Subtests) -> None:
    with running_server(str(long_checkpoint), "--served-model-name", MODEL) as server:
        kill = server.engine_process().kill
        check_cases(run_cases("dying.mjs", server.url, started=kill), subtests, num_cases=1)
