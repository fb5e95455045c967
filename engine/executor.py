"""Executor: StepPlan -> StepResult, the line between scheduling and computing.

Everything below this line may run in this process or, one rank each, in several; everything above it knows no tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from engine.memory import peak_memory_bytes
from engine.runner import Runner
from engine.sampler import Sampled
from engine.scheduler import StepPlan
from engine.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step computed.

    `sampled` has one entry for each chunk that samples and wants a token, keyed by the chunk's index in the plan;
    `prompt_logprobs` one for each chunk whose request scores its prompt: entries for the prompt tokens that follow the
    chunk's tokens.
    """

    sampled: dict[int, Sampled]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)


class OutOfDeviceMemoryError(Exception):
    """The step did not fit into device memory; nothing of it counts, and the executor can go on."""


class Executor(Protocol):
    def execute(self, plan: StepPlan) -> StepResult:
        """Compute a plan that is not empty. Raises OutOfDeviceMemoryError when only this step has to be given up."""
        ...

    def peak_memory_bytes(self) -> int:
        """Highest memory use so far: of the device on a GPU, of the process on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class LocalExecutor:
    """One rank, in this process."""

    runner: Runner

    def execute(self, plan: StepPlan) -> StepResult:
        try:
            sampled, prompt_logprobs = self.runner.run(plan)
        except MemoryError as error:
            raise OutOfDeviceMemoryError(str(error)) from error
        except RuntimeError as error:
            if not self.runner.is_out_of_memory(error):
                raise
            raise OutOfDeviceMemoryError(str(error).splitlines()[0]) from error
        return StepResult(sampled, prompt_logprobs)

    def peak_memory_bytes(self) -> int:
        return peak_memory_bytes(self.runner.model.backend.device)
