"""Memory of a process and its children."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from server.bench.errors import BenchError
from server.bench.memory import MemorySampler, tree_memory

MIB = 2**20
CHILD = "import sys; x = bytearray({size}); print('ready', flush=True); sys.stdin.read({wait}); {then}"
GROW = "y = bytearray({size}); print('grown', flush=True); sys.stdin.read()"
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdin=sys.stdin)
sys.exit(child.wait())
"""


@contextmanager
def tree(size: int, *, growth: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process with a child that holds `size` bytes and, once it is sent a character, `growth` more."""
    child = CHILD.format(size=size, wait=1, then=GROW.format(size=growth))
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdout:
        try:
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.stdin.close()
            process.wait()


def test_children_count() -> None:
    with tree(64 * MIB) as process:
        resident = tree_memory(process.pid)
        members = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(members) == 2
        assert resident == pytest.approx(sum(member.memory_info().rss for member in members), rel=0.02)
        shared = tree_memory(process.pid, proportional=True)
        assert shared == pytest.approx(sum(member.memory_full_info().pss for member in members), rel=0.02)
        assert 64 * MIB < shared < resident
    assert tree_memory(process.pid) == 0


def test_samples_while_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.bench.memory._INTERVAL", 0.05)

    async def run(process: subprocess.Popen[str]) -> MemorySampler:
        assert process.stdin is not None
        assert process.stdout is not None
        async with MemorySampler(process.pid) as sampler:
            await asyncio.sleep(0.2)
            process.stdin.write("x")
            process.stdin.flush()
            await asyncio.to_thread(process.stdout.readline)
            await sampler.sample()
            process.stdin.close()
            await asyncio.to_thread(process.wait)
            await sampler.sample()
        return sampler

    with tree(32 * MIB, growth=64 * MIB) as process:
        before = tree_memory(process.pid, proportional=True)
        sampler = asyncio.run(run(process))
    assert len(sampler.samples) >= 3
    assert sampler.samples[0].num_bytes == pytest.approx(before, rel=0.05), "what is shared counts once"
    assert sampler.peak() - before == pytest.approx(64 * MIB, rel=0.1)
    assert sampler.peak(first=len(sampler.samples)) == 0
    seconds = [sample.seconds for sample in sampler.samples]
    assert seconds == sorted(seconds)
    assert all(sample.num_bytes > 0 for sample in sampler.samples), "none of the process that has ended"


def test_no_such_process() -> None:
    async def run() -> None:
        async with MemorySampler(2**22 + 1):
            pass

    with pytest.raises(BenchError, match="no process 4194305"):
        asyncio.run(run())


def test_another_users_process_counts_as_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *args: object) -> object:
        if path.endswith("smaps_rollup"):
            raise PermissionError
        return open(path, *args)  # type: ignore[call-overload]

    with tree(8 * MIB) as process:
        monkeypatch.setattr("server.bench.memory.open", refuse, raising=False)
        assert tree_memory(process.pid, proportional=True) == tree_memory(process.pid)
