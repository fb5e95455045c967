"""Executor: StepPlan -> StepResult, the line between scheduling and computing.

Everything below this line may run in this process or, one rank each, in several; everything above it knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from engine.memory import peak_memory_bytes
from engine.result import StepResult
from engine.routing.record import RoutingRecord
from engine.runner import Runner
from engine.scheduler import StepPlan


class OutOfDeviceMemoryError(Exception):
    """The step did not fit into device memory; nothing of it counts, and the executor can go on."""


class Executor(Protocol):
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a plan that is not empty. Raises OutOfDeviceMemoryError when only this step has to be given up."""
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

    def execute(self, plan: StepPlan) -> StepResult:
        try:
            return self.runner.run(plan)
        except MemoryError as error:
            raise OutOfDeviceMemoryError(str(error)) from error
        except RuntimeError as error:
            if not self.runner.is_out_of_memory(error):
                raise
            raise OutOfDeviceMemoryError(str(error).splitlines()[0]) from error

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.runner.model.backend.device)

    def routing_record(self) -> RoutingRecord | None:
        return self.runner.record
