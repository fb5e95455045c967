"""Two servers for the whole folder: an open one, and one with keys and room for one request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.conformance.asking import MODEL, Ask
from tests.e2e.running import Server, running_server

KEYS = ("key-alpha", "key-beta", "key-gamma")


@pytest.fixture(scope="package")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    """Of byte tokens: token i < 256 is byte i, 257 and 259 end a sequence."""
    with running_server(str(tiny_checkpoint), "--served-model-name", MODEL, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="package")
def keyed_server(tiny_checkpoint: Path) -> Iterator[Server]:
    """One request at a time for each of KEYS, one that runs and one that waits in all."""
    keys = [argument for key in KEYS for argument in ("--api-key", key)]
    limits = ("--max-concurrent-per-key", "1", "--max-num-seqs", "1", "--max-num-queued-requests", "1")
    with running_server(str(tiny_checkpoint), "--served-model-name", MODEL, *keys, *limits) as server:
        yield server


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def ask(request: pytest.FixtureRequest, client: openai.OpenAI) -> Ask:
    """Asks for a whole answer, then for a streamed one."""
    return Ask(client, stream=request.param)
