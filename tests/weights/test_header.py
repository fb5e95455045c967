from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from weights.errors import CheckpointError
from weights.header import DTYPES, MAX_HEADER_BYTES, HeaderEntry, read_header


def write(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A file with this header (JSON, or bytes as they are) and data; `length` lies about the header's size."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(start: Any, end: Any, shape: Any = None, dtype: Any = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def test_what_the_reference_library_writes(tmp_path: Path) -> None:
    tensors = {
        "b": torch.zeros(3, 5, dtype=torch.bfloat16),
        "a": torch.zeros((), dtype=torch.float32),
        "empty": torch.zeros(0, 4),
        "é": torch.zeros(7, dtype=torch.uint8),
    }
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert {name: (e.dtype, e.shape) for name, e in header.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert [e.start for e in header.values()] == sorted(e.start for e in header.values())
    assert max(e.end for e in header.values()) == path.stat().st_size


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_means_what_the_reference_library_means(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.zeros(2, 3, dtype=torch.uint8).to(dtype)}, path)
    assert read_header(path)["x"].dtype == dtype


def test_positions_count_from_the_beginning_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x", {"late": entry(2, 5), "early": entry(0, 2)}, b"12345")
    first = path.stat().st_size - 5
    assert list(read_header(path).items()) == [
        ("early", HeaderEntry(torch.uint8, (2,), first, first + 2)),
        ("late", HeaderEntry(torch.uint8, (3,), first + 2, first + 5)),
    ]


def test_empty_tensors_take_no_room(tmp_path: Path) -> None:
    header = {"x": entry(0, 4), "y": entry(4, 4), "z": entry(4, 6), "w": entry(0, 0)}
    assert set(read_header(write(tmp_path / "x", header, b"123456"))) == {"x", "y", "z", "w"}
    assert read_header(write(tmp_path / "none", {"__metadata__": {"a": "b"}})) == {}


@pytest.mark.parametrize("content", [b"", b"\x01", b"\x01\0\0\0\0\0\0"])
def test_shorter_than_a_length(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match="x: not a safetensors file"):
        read_header(tmp_path / "x")


def test_header_sizes(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x: header of 3 bytes is longer than the file \(10 bytes\)"):
        read_header(write(tmp_path / "x", b"{}", length=3))
    for length in (MAX_HEADER_BYTES + 1, 2**64 - 1):
        with pytest.raises(CheckpointError, match="over the limit"):
            read_header(write(tmp_path / "x", b"{}", length=length))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a\xff": 1}', "not UTF-8"),
        (b"{", "malformed JSON"),
        (b"[]", "not a JSON object"),
        (b'{"x": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"x": {}, "x": {}}', "'x' appears twice"),
        ({"x": []}, "tensor 'x': entry must have"),
        ({"x": {"dtype": "U8", "shape": [4]}}, "tensor 'x': entry must have"),
        ({"x": entry(0, 4, dtype="F4")}, "tensor 'x': unknown dtype 'F4'"),
        ({"x": entry(0, 4, dtype=["U8"])}, "unknown dtype"),
        ({"x": entry(0, 4, shape=4)}, "tensor 'x': shape must be"),
        ({"x": entry(0, 4, shape=[-4])}, "shape must be"),
        ({"x": entry(0, 4, shape=[4.0])}, "shape must be"),
        ({"x": entry(0, 4, shape=[True, 4])}, "shape must be"),
        ({"x": entry(0, 4, shape=[1] * 17)}, "shape must be"),
        ({"x": entry(0, 4, shape=[2**32, 2**32])}, "tensor 'x': shape is too large"),
        ({"x": entry(0, 4, shape=[2**62], dtype="F32")}, "tensor 'x': shape is too large"),
        ({"x": entry(0, 4, shape=[2**64])}, "shape must be"),
        ({"x": entry(0, 4, shape=[3])}, "tensor 'x': shape and dtype need 3 bytes, data_offsets give 4"),
        ({"x": entry(0, 4, dtype="F32", shape=[4])}, "need 16 bytes"),
        ({"x": entry(4, 0, shape=[4])}, "data_offsets give -4"),
        ({"x": entry(0, 4) | {"data_offsets": [0, 2, 4]}}, "data_offsets must be"),
        ({"x": entry(0, 4) | {"data_offsets": ["0", "4"]}}, "data_offsets must be"),
        ({"x": entry(0, 4) | {"data_offsets": [-4, 0]}}, "data_offsets must be"),
        ({"x": entry(0, 2), "y": entry(1, 4)}, "tensor 'y' overlaps the tensor before it"),
        ({"x": entry(0, 4), "y": entry(0, 4)}, "overlaps"),
        ({"x": entry(0, 1), "y": entry(2, 4)}, "tensor 'y' leaves a gap before it"),
        ({"x": entry(1, 4)}, "tensor 'x' leaves a gap before it"),
        ({"x": entry(0, 5)}, "tensor 'x' runs past the end of the file"),
        ({"x": entry(0, 2**40)}, "runs past the end of the file"),
        ({"x": entry(0, 3)}, "1 bytes at the end belong to no tensor"),
        ({}, "4 bytes at the end belong to no tensor"),
    ],
)
def test_a_bad_header_is_named(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"bad: .*{message}") as caught:
        read_header(write(tmp_path / "bad", header, b"1234"))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing: No such file"):
        read_header(tmp_path / "nothing")
