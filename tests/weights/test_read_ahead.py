from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from weights import read_ahead as module
from weights.errors import CheckpointError
from weights.header import HeaderEntry
from weights.read_ahead import Extent, read_ahead
from weights.staging import HostStaging, Ring


def write(folder: Path, sizes: list[list[int]]) -> tuple[list[Extent], list[Tensor]]:
    """Files of tensors of these bytes, one behind the other after 7 bytes, and what they hold."""
    extents, values = [], []
    generator = torch.Generator().manual_seed(1)
    for number, own in enumerate(sizes):
        path, position = folder / f"{number}.bin", 7
        content = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in own]
        path.write_bytes(bytes(7) + b"".join(tensor.numpy().tobytes() for tensor in content))
        for i, size in enumerate(own):
            entry = HeaderEntry(torch.uint8, (size,), position, position + size)
            extents.append(Extent(f"{number}.{i}", path, entry, 7 + sum(own)))
            position += size
        values += content
    return extents, values


class SlowDevice:
    """A device whose copies happen when their events fire, as late as can be: a sink leaves `source`."""

    ahead_bytes = 0

    def __init__(self, queries: int) -> None:
        self._queries = queries
        self.source: Tensor | None = None
        self.copies: list[Tensor] = []

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def record(self) -> SlowCopy:
        assert self.source is not None
        return SlowCopy(self.source, self.copies, self._queries)


class SlowCopy:
    def __init__(self, source: Tensor, copies: list[Tensor], queries: int) -> None:
        self._source, self._copies, self._left = source, copies, queries

    def query(self) -> bool:
        self._left -= 1
        if self._left == 0:
            self._copies.append(self._source.clone())
        return self._left <= 0

    def synchronize(self) -> None:
        while not self.query():
            pass


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("device", [None, 1, 4])
def test_tensors_come_whole_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, device: int | None
) -> None:
    """In chunks of 100 bytes, through rings of any size, to a sink that copies at once or to one that copies late."""
    rng = random.Random(seed)
    sizes = [[rng.choice([0, 1, 99, 100, 101, rng.randint(0, 3000)]) for _ in range(20)] for _ in range(3)]
    extents, values = write(tmp_path, sizes)
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    staging = HostStaging() if device is None else SlowDevice(device)
    ring = Ring(staging, rng.choice([3000, 4000, 100_000]))
    names, copies = [], []
    for name, tensor in read_ahead(extents, ring):
        names.append(name)
        if isinstance(staging, SlowDevice):
            staging.source = tensor
        else:
            copies.append(tensor.clone())
    copies = staging.copies if isinstance(staging, SlowDevice) else copies
    assert names == [extent.name for extent in extents]
    assert all(torch.equal(copy, value) for copy, value in zip(copies, values, strict=True))


def test_several_threads_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across two files, each opened once, and in pieces of one tensor."""
    extents, values = write(tmp_path, [[400], [400]])
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    together = threading.Barrier(8)
    files = set()
    read = os.preadv

    def wait_for_the_others(file: int, buffers: Any, position: int) -> int:
        files.add(file)
        together.wait(10)
        return read(file, buffers, position)

    monkeypatch.setattr(os, "preadv", wait_for_the_others)
    copies = [tensor.clone() for _, tensor in read_ahead(extents, Ring(HostStaging(), 1000))]
    assert len(files) == 2
    assert all(torch.equal(copy, value) for copy, value in zip(copies, values, strict=True))


def test_reading_is_ahead_by_the_ring_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extents, _ = write(tmp_path, [[640] * 20])
    num_read = []
    read = os.preadv

    def count(file: int, buffers: Any, position: int) -> int:
        num_read.append(read(file, buffers, position))
        return num_read[-1]

    monkeypatch.setattr(os, "preadv", count)
    reading = read_ahead(extents, Ring(HostStaging(), 5 * 640))
    for taken in range(1, 16):
        next(reading)
        ahead = taken + 4
        deadline = time.monotonic() + 10
        while len(num_read) < ahead and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        assert sum(num_read) == 640 * ahead
    reading.close()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extents, values = write(tmp_path, [[1000, 3]])
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, position: read(file, [buffers[0][:17]], position))
    copies = [tensor.clone() for _, tensor in read_ahead(extents, Ring(HostStaging(), 2000))]
    assert all(torch.equal(copy, value) for copy, value in zip(copies, values, strict=True))


def cut(path: Path, _: pytest.MonkeyPatch) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path, _: pytest.MonkeyPatch) -> None:
    os.truncate(path, path.stat().st_size + 1)


def remove(path: Path, _: pytest.MonkeyPatch) -> None:
    path.unlink()


def break_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = os.preadv

    def fail(file: int, buffers: Any, position: int) -> int:
        if os.readlink(f"/proc/self/fd/{file}") == str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, buffers, position)

    monkeypatch.setattr(os, "preadv", fail)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts Linux's file descriptors")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"has 134 bytes, and had 135 when its header was read"),
        (lengthen, r"has 136 bytes, and had 135 when"),
        (remove, "No such file"),
        (break_disk, "Input/output error"),
    ],
)
def test_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path, pytest.MonkeyPatch], None], message: str
) -> None:
    extents, values = write(tmp_path, [[64] * 3, [64, 64]])
    damage(tmp_path / "1.bin", monkeypatch)
    before = resources()
    copies: list[Tensor] = []
    with pytest.raises(CheckpointError, match=rf"1\.bin: {message}"):
        copies.extend(tensor.clone() for _, tensor in read_ahead(extents, Ring(HostStaging(), 128)))
    assert all(torch.equal(copy, value) for copy, value in zip(copies, values, strict=False))
    assert resources() == before


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    extents, values = write(tmp_path, [[64] * 8])
    reading = read_ahead(extents, Ring(HostStaging(), 64))
    _, first = next(reading)
    assert torch.equal(first, values[0])
    os.truncate(tmp_path / "0.bin", 7 + 3 * 64)
    with pytest.raises(CheckpointError, match=r"0\.bin: was cut short while it was read"):
        list(reading)


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(tmp_path: Path) -> None:
    """As a download that puts its file in place at the end does: no part of the new one gets between the old."""
    extents, values = write(tmp_path, [[64] * 4, [64] * 4])
    reading = read_ahead(extents, Ring(HostStaging(), 64))
    copies = [next(reading)[1].clone()]
    for name in ("0.bin", "1.bin"):
        (tmp_path / "new").write_bytes(bytes(7 + 4 * 64))
        (tmp_path / "new").replace(tmp_path / name)
    copies += [tensor.clone() for _, tensor in reading]
    assert all(torch.equal(copy, value) for copy, value in zip(copies, values, strict=True))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts Linux's file descriptors")
@pytest.mark.parametrize("how", ["close", "drop", "error"])
def test_nothing_is_left_of_a_reading_that_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Also where readers are in the middle of their chunks, and more chunks wait for a thread."""
    extents, _ = write(tmp_path, [[6400] * 20])
    monkeypatch.setattr(module, "CHUNK_BYTES", 100)
    read = os.preadv

    def slowly(file: int, buffers: Any, position: int) -> int:
        time.sleep(0.005)
        return read(file, buffers, position)

    monkeypatch.setattr(os, "preadv", slowly)
    before = resources()
    reading: Generator[tuple[str, Tensor], None, None] = read_ahead(extents, Ring(HostStaging(), 1 << 20))
    next(reading)
    assert resources() != before
    start = time.monotonic()
    if how == "close":
        reading.close()
    elif how == "drop":
        del reading
    else:
        with pytest.raises(KeyError):
            reading.throw(KeyError())
    assert time.monotonic() - start < 0.5, "the 1,216 chunks left, 8 at a time, take 0.76 s or more"
    assert resources() == before


def resources() -> tuple[int, int]:
    """Threads and open files of this process."""
    return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))
