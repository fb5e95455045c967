"""Memory of a local server, sampled while it works: its process and all that it has started. Linux only.

What processes share counts once. The kernel knows that (PSS), but asking costs it a walk through all pages, 50 ms a GB,
so it is asked once. The samples are resident memory less what the processes shared then.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from server.bench.errors import BenchError

_INTERVAL = 0.5


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    """Since the sampler was started."""
    num_bytes: int


class MemorySampler:
    """Samples every half second while it is entered. Raises BenchError, when it is entered, if there is no `pid`."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._start = 0.0
        self._shared = 0
        self._task: asyncio.Task[None] | None = None
        self.samples: list[Sample] = []

    async def __aenter__(self) -> Self:
        resident = await asyncio.to_thread(tree_memory, self._pid)
        if not resident:
            raise BenchError(f"there is no process {self._pid} whose memory can be read in /proc")
        self._shared = resident - await asyncio.to_thread(tree_memory, self._pid, proportional=True)
        self._start = time.perf_counter()
        await self.sample()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def sample(self) -> None:
        """Take one now; none of a process that is gone."""
        if num_bytes := await asyncio.to_thread(tree_memory, self._pid):
            self.samples.append(Sample(time.perf_counter() - self._start, num_bytes - self._shared))

    def peak(self, first: int = 0) -> int:
        """The most since sample number `first`."""
        return max((sample.num_bytes for sample in self.samples[first:]), default=0)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_INTERVAL)
            await self.sample()


def tree_memory(pid: int, *, proportional: bool = False) -> int:
    """Resident bytes of a process and all its descendants, 0 of one that is gone; `proportional`: what several
    processes share is divided among them."""
    memory = _proportional if proportional else _resident
    total = 0
    for member in _tree(pid):
        with suppress(OSError):  # it may just have ended
            total += memory(member)
    return total


def _tree(pid: int) -> set[int]:
    """The process and its descendants."""
    parents: dict[int, int] = {}
    for name in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                # The second field, a name in parentheses, may hold anything.
                parents[int(name)] = int(stat.read().rpartition(b")")[2].split()[1])
    tree = {pid}
    while found := {child for child, parent in parents.items() if parent in tree} - tree:
        tree |= found
    return tree


def _resident(pid: int) -> int:
    with open(f"/proc/{pid}/statm", "rb") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def _proportional(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as rollup:
            return next(int(line.split()[1]) for line in rollup if line.startswith(b"Pss:")) * 1024
    except PermissionError:  # of another user's process
        return _resident(pid)
