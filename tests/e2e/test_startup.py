"""A start that cannot work ends with exit code 1 and one line, before anything is loaded."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import free_port
from tests.tiny import write_tiny_mixtral
from tests.tiny_tokenizer import VOCAB_SIZE, write_byte_tokenizer


def failed_start(*args: str) -> str:
    """The one line that `mixserve serve` ends with."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", *args]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    lines = result.stderr.splitlines()
    assert (result.returncode, len(lines)) == (1, 1), result.stderr
    return lines[0]


def test_a_busy_port(tiny_checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in failed_start(str(tiny_checkpoint), "--port", port)


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path, vocab_size=VOCAB_SIZE - 3)
    write_byte_tokenizer(tmp_path)
    assert "vocabulary has 257 tokens" in failed_start(str(tmp_path))


def test_a_cache_for_less_than_one_sequence(tiny_checkpoint: Path) -> None:
    line = failed_start(str(tiny_checkpoint), "--kv-cache-memory-bytes", "64KiB")
    needed = 2048 * 2 * 2 * 2 * 8 * 4  # tokens, K and V, layers, kv heads, head_dim, float32
    assert f"{needed:,} bytes" in line


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt_bigcode"}, "model_type"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"num_local_experts": 3}, "left over"),
        ({"intermediate_size": 47}, "wrong shape"),
    ],
)
def test_a_checkpoint_that_is_not_what_its_config_says(
    tiny_checkpoint: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert said in failed_start(str(folder))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "nowhere" in failed_start(str(tmp_path / "nowhere"))


def test_a_server_that_waits_for_its_model_answers_and_can_be_ended(tmp_path: Path) -> None:
    """The demo's lock is held, as by another process that builds it."""
    port = free_port()
    with (tmp_path / "mixserve-demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = subprocess.Popen(
            [sys.executable, "-m", "server", "serve", "--port", str(port)],
            env=os.environ | {"MIXSERVE_CACHE": str(tmp_path)},
        )
        try:
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"http://127.0.0.1:{port}/health").json() == {"status": "loading"}:
                        break
                time.sleep(0.05)
            assert httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 503
            process.send_signal(signal.SIGTERM)
            assert process.wait(4) == 0
        finally:
            process.kill()
            process.wait()
