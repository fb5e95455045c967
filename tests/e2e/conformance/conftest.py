"""Two servers for the whole folder: an open one, and one with keys and room for one request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.conformance.asking import MODEL, Ask
from tests.e2e.running import Server, running_server
from tests.tiny import write_tiny_mixtral
from tests.tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer

KEYS = ("key-alpha", "key-beta", "key-gamma")


@pytest.fixture(scope="package")
def server(tiny_checkpoint: Path) -> Iterator[Server]:
    """Of byte tokens: token i < 256 is byte i, 257 and 259 end a sequence."""
    with running_server(str(tiny_checkpoint), "--served-model-name", MODEL, "--dtype", "float32") as server:
        yield server


@pytest.fixture(scope="package")
def long_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a context of 16,384 tokens, which take several seconds."""
    folder = tmp_path_factory.mktemp("long")
    write_tiny_mixtral(folder, vocab_size=VOCAB_SIZE, max_position_embeddings=16384, eos_token_ids=(257,), seed=1)
    write_byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="package")
def keyed_server(long_checkpoint: Path) -> Iterator[Server]:
    """One request at a time for each of KEYS, one that runs and one that waits in all."""
    keys = [argument for key in KEYS for argument in ("--api-key", key)]
    limits = ("--max-concurrent-per-key", "1", "--max-num-seqs", "1", "--max-num-queued-requests", "1")
    with running_server(str(long_checkpoint), "--served-model-name", MODEL, *keys, *limits) as server:
        yield server


@pytest.fixture(scope="package")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(params=[False, True], ids=["whole", "streamed"])
def ask(request: pytest.FixtureRequest, client: openai.OpenAI) -> Ask:
    """Asks for a whole answer, then for a streamed one."""
    return Ask(client, stream=request.param)
