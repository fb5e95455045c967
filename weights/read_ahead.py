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

    Chunks of 16 MB are read by 8 threads at once, across tensors and files. Raises CheckpointError, when the tensor's
    turn comes, for a file that ends too early or cannot be read. No thread is left when this ends, by an error, too,
    or by `close`.
    """
    left = deque(extents)
    arriving: deque[_Arriving] = deque()
    pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix="weights")
    try:
        while left or arriving:
            while left and (memory := ring.take(left[0].nbytes)) is not None:
                arriving.append(_submit(pool, left.popleft(), memory))
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


def _submit(pool: ThreadPoolExecutor, extent: Extent, memory: Tensor) -> _Arriving:
    starts = range(0, extent.nbytes, CHUNK_BYTES)
    chunks = (
        pool.submit(_read, extent.path, extent.entry.start + start, memory[start : start + CHUNK_BYTES])
        for start in starts
    )
    return _Arriving(extent, memory, tuple(chunks))


def _read(path: Path, position: int, memory: Tensor) -> None:
    """Fills `memory` from the file's byte `position` on, through a file descriptor of its own."""
    assert memory.dtype == torch.uint8
    view = memory.numpy().data
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while view:
                if not (count := os.preadv(file, [view], position)):
                    raise CheckpointError(f"{path}: was cut short while it was read")
                position += count
                view = view[count:]
        finally:
            os.close(file)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
