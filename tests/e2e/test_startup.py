"""A start that cannot work ends with exit code 1 and one line, before anything is loaded."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

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
