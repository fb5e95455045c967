from __future__ import annotations

import random
from collections import deque

import pytest
import torch
from torch import Tensor

from weights.staging import HostStaging, PinnedStaging, Ring, staging_for


class LateEvent:
    """Fires when it has been asked often enough, or is waited for."""

    def __init__(self, queries: int) -> None:
        self.left = queries
        self.num_waits = 0

    def query(self) -> bool:
        self.left -= 1
        return self.left < 0

    def synchronize(self) -> None:
        self.left = 0
        self.num_waits += 1


class Late:
    """Staging whose copies are done late."""

    ahead_bytes = 0

    def __init__(self, queries: int) -> None:
        self._queries = queries
        self.events: list[LateEvent] = []

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def record(self) -> LateEvent:
        self.events.append(LateEvent(self._queries))
        return self.events[-1]


def take(ring: Ring, num_bytes: int) -> Tensor:
    memory = ring.take(num_bytes)
    assert memory is not None
    return memory


def test_the_example_of_the_docstring() -> None:
    ring = Ring(HostStaging(), 256)
    a, b = take(ring, 128), take(ring, 64)
    assert b.data_ptr() == a.data_ptr() + 128
    assert ring.take(100) is None
    ring.release()
    c = take(ring, 100)
    assert c.data_ptr() == a.data_ptr()
    assert ring.take(64) is None, "the 64 bytes at the end lie before b, and are lost until b is released"
    ring.release()
    ring.release()
    assert take(ring, 256).data_ptr() == a.data_ptr(), "an empty ring starts from its beginning"


@pytest.mark.parametrize("seed", range(20))
def test_no_two_stretches_in_use_overlap(seed: int) -> None:
    """Whatever is taken and released: each keeps what was written to it until its event has fired."""
    rng = random.Random(seed)
    size = rng.choice([64, 256, 1000, 4096])
    staging = Late(queries=rng.choice([0, 1, 5]))
    ring = Ring(staging, size)
    in_use: deque[tuple[Tensor, int]] = deque()
    leaving: deque[tuple[Tensor, int, LateEvent]] = deque()
    taken = 0
    for turn in range(500):
        if (
            rng.random() < 0.6
            and (memory := ring.take(num_bytes := rng.choice([0, 1, 63, 64, rng.randint(0, size)]))) is not None
        ):
            assert memory.shape == (num_bytes,)
            assert not num_bytes or memory.data_ptr() % 64 == 0
            memory.fill_(turn % 251)
            in_use.append((memory, turn % 251))
            taken += 1
        elif in_use:
            ring.release()
            leaving.append((*in_use.popleft(), staging.events[-1]))
        elif leaving and leaving[-1][2].left > 0:
            ring.wait()
        while leaving and leaving[0][2].left <= 0:
            leaving.popleft()
        assert all((memory == value).all() for memory, value in in_use)
        assert all((memory == value).all() for memory, value, _ in leaving)
    assert taken > 50


def test_nothing_can_be_taken_of_nothing() -> None:
    assert take(Ring(HostStaging(), 0), 0).shape == (0,)


def test_memory_is_used_again_when_its_event_has_fired() -> None:
    staging = Late(queries=3)
    ring = Ring(staging, 64)
    take(ring, 64)
    ring.release()
    assert [ring.take(64) is None for _ in range(4)] == [True, True, True, False]
    ring.release()
    ring.wait()
    assert staging.events[-1].num_waits == 1
    take(ring, 1)


def test_drain_waits_for_all() -> None:
    staging = Late(queries=100)
    ring = Ring(staging, 256)
    for _ in range(3):
        take(ring, 10)
    for _ in range(3):
        ring.release()
    ring.drain()
    assert all(event.left <= 0 for event in staging.events)


def test_a_gpu_gets_pinned_memory() -> None:
    assert isinstance(staging_for(torch.device("cuda", 1)), PinnedStaging)
    assert isinstance(staging_for(torch.device("cpu")), HostStaging)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_memory_and_its_events() -> None:
    device = torch.device("cuda", 0)
    staging = PinnedStaging(device)
    memory = staging.allocate(1 << 20)
    assert memory.is_pinned()
    memory.fill_(7)
    copy = memory.to(device, non_blocking=True)
    event = staging.record()
    event.synchronize()
    assert event.query()
    assert (copy == 7).all()
