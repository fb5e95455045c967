"""Executor: StepPlan -> StepResult, the line between scheduling and computing.

Everything below this line may run in this process or, one rank each, in several; everything above it knows no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from engine.memory import peak_memory_bytes
from engine.result import StepResult
from engine.routing.record import RoutingRecord
from engine.runner import Runner
from engine.runner import Step as RunnerStep
from engine.scheduler import StepPlan


class OutOfDeviceMemoryError(Exception):
    """The step did not fit into device memory; nothing of it counts, and the executor can go on."""


class Step(Protocol):
    """A step under way. Both are called, in this order."""

    def sample(self) -> None:
        """Choose tokens, by all that is known of the sequences: the tokens of the step before have been appended.
        Raises as `Executor.forward`.
        """
        ...

    def result(self) -> StepResult:
        """What came of it; waits for the device."""
        ...


class Executor(Protocol):
    @property
    def runs_ahead(self) -> bool:
        """Whether the device computes while the host goes on: then the next step may begin before this one's result."""
        ...

    def forward(self, plan: StepPlan) -> Step:
        """Begin to compute a plan that is not empty. Pending tokens are those of the step before, which was sampled.

        Raises OutOfDeviceMemoryError when only this step has to be given up.
        """
        ...

    def peak_memory_bytes(self) -> int:
        """Highest memory use so far: of the device on a GPU, of the process on the CPU."""
        ...

    def routing_record(self) -> RoutingRecord | None:
        """What the routers decided, None when it is not recorded."""
        ...


@dataclass(frozen=True, slots=True)
class LocalExecutor:
    """One rank, in this process."""

    runner: Runner
    runs_ahead: bool = False

    def forward(self, plan: StepPlan) -> Step:
        with _running_out(self.runner):
            return LocalStep(self.runner, self.runner.forward(plan))

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.runner.model.backend.device)

    def routing_record(self) -> RoutingRecord | None:
        return self.runner.record


@dataclass(frozen=True, slots=True)
class LocalStep:
    """A runner's step; running out of memory is told by the executor's exception."""

    runner: Runner
    step: RunnerStep

    def sample(self) -> None:
        with _running_out(self.runner):
            self.step.sample()

    def result(self) -> StepResult:
        return self.step.result()


@contextmanager
def _running_out(runner: Runner) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise OutOfDeviceMemoryError(str(error)) from error
    except RuntimeError as error:
        if not runner.is_out_of_memory(error):
            raise
        raise OutOfDeviceMemoryError(str(error).splitlines()[0]) from error
