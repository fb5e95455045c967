from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from tests.tiny import TINY_LLAMA, tiny_tensors
from tests.weights.gguf_files import write_gguf
from weights.errors import CheckpointError
from weights.gguf_metadata import MAX_ENTRIES, metadata, open_gguf


def test_scalars_and_strings(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", TINY_LLAMA, tiny_tensors(TINY_LLAMA), edit=lambda w: w.add_token_list(["a", "b"]))
    values = metadata(open_gguf(tmp_path / "x.gguf"))
    assert values["general.architecture"] == "llama"
    assert values["llama.block_count"] == 2
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "tokenizer.ggml.tokens" not in values


def test_files_that_are_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, TINY_LLAMA, tiny_tensors(TINY_LLAMA))
    whole = path.read_bytes()
    cut = [whole[:size] for size in (0, 4, 20, 30, 100, 2000, len(whole) - 1)]
    for content in (*cut, b"GGML" + whole[4:], whole[:4] + b"\x09" + whole[5:], whole[:8] + b"\xff" * 16 + whole[24:]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"x\.gguf: malformed GGUF file") as caught:
            open_gguf(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        open_gguf(path)
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_gguf(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (struct.pack("<IIQ", 9, 5, 1 << 60), "a list of 1,152,921,504,606,846,976 entries"),
        (struct.pack("<IIQ", 9, 5, MAX_ENTRIES + 1), "a list of 2,097,153 entries"),
        (struct.pack("<IIQ", 9, 5, MAX_ENTRIES), "past the end"),
        (struct.pack("<IIQ", 9, 8, MAX_ENTRIES), "past the end"),
        (struct.pack("<IIQ", 9, 9, 1), "a value of type 9"),
        (struct.pack("<IQ", 8, 1 << 63), "past the end"),
        (struct.pack("<I", 77), "a value of type 77"),
        (struct.pack("<I", 4), "past the end"),
    ],
)
def test_lengths_are_not_believed(tmp_path: Path, value: bytes, message: str) -> None:
    pair = struct.pack("<Q", 1) + b"k" + value
    (tmp_path / "x.gguf").write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + pair)
    with pytest.raises(CheckpointError, match=rf"malformed GGUF file \(.*{message}"):
        open_gguf(tmp_path / "x.gguf")
