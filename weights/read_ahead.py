"""Tensors out of files, read by threads ahead of whoever takes them.

One thread, the caller's, hands out the memory and the work, so that no two ever wait for each other: a reader has
nothing to do but to fill its chunk. How far they are ahead is bounded by the ring's bytes.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weights.errors import CheckpointError
from weights.header import HeaderEntry
from weights.staging import Ring

NUM_READERS = 8
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Extent:
    """Where a tensor is."""

    name: str
    path: Path
    entry: HeaderEntry
    file_bytes: int
    """Bytes of the whole file, as its header has it."""

    @property
    def nbytes(self) -> int:
        return self.entry.end - self.entry.start


@dataclass(frozen=True, slots=True)
class _Arriving:
    extent: Extent
    memory: Tensor  # uint8
    chunks: tuple[Future[None], ...]


def read_ahead(extents: Iterable[Extent], ring: Ring) -> Generator[tuple[str, Tensor], None, None]:
    """The tensors in the order given, each until the next one is asked for. The ring has to hold the largest of them.

    Chunks of 16 MB are read by 8 threads at once, across tensors and files. Every file is opened once, before anything
    is read, so that one that is replaced meanwhile is read as it was. Raises CheckpointError, before the first tensor,
    for a file that cannot be opened or is no longer as long as its header has it; and when the tensor's turn comes, for
    one that ends too early or cannot be read. No thread and no open file is left when this ends, by an error, too, or
    by `close`.
    """
    left = deque(extents)
    files: dict[Path, int] = {}
    arriving: deque[_Arriving] = deque()
    pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="weights")
    try:
        for extent in left:
            if extent.path not in files:
                files[extent.path] = _open(extent)
        while left or arriving:
            while left and (memory := ring.take(left[0].nbytes)) is not None:
                arriving.append(_submit(pool, files[left[0].path], left.popleft(), memory))
            if not arriving:  # all of the ring is still being copied from
                ring.wait()
                continue
            tensor = arriving.popleft()
            for chunk in tensor.chunks:
                chunk.result()
            entry = tensor.extent.entry
            yield tensor.extent.name, tensor.memory.view(entry.dtype).view(entry.shape)
            ring.release()
        ring.drain()
    finally:
        pool.shutdown(cancel_futures=True)
        for file in files.values():
            os.close(file)


def _open(extent: Extent) -> int:
    try:
        file = os.open(extent.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{extent.path}: {error.strerror}") from None
    if (size := os.fstat(file).st_size) != extent.file_bytes:
        os.close(file)
        raise CheckpointError(
            f"{extent.path}: has {size:,} bytes, and had {extent.file_bytes:,} when its header was read: it was changed"
        )
    return file


def _submit(pool: ThreadPoolExecutor, file: int, extent: Extent, memory: Tensor) -> _Arriving:
    starts = range(0, extent.nbytes, CHUNK_BYTES)
    chunks = (
        pool.submit(_read, file, extent.path, extent.entry.start + start, memory[start : start + CHUNK_BYTES])
        for start in starts
    )
    return _Arriving(extent, memory, tuple(chunks))


def _read(file: int, path: Path, position: int, memory: Tensor) -> None:
    """Fills `memory` from byte `position` of `file` on, which is `path`'s. Threads share it: preadv has no position of
    its own to move.
    """
    assert memory.dtype == torch.uint8
    view = memory.numpy().data
    try:
        while view:
            if not (count := os.preadv(file, [view], position)):
                raise CheckpointError(f"{path}: was cut short while it was read")
            position += count
            view = view[count:]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
