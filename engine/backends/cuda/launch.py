"""Launch: a kernel, its grid and its arguments as a value, so that tests compile exactly what the engine launches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from triton.runtime import JITFunction


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a jit function: what it runs with, and how to run it."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: Mapping[str, Tensor | int | float | None]
    """The runtime arguments by name; an argument that is None costs nothing, since the code without it is compiled."""
    constexprs: Mapping[str, object]
    num_warps: int
    num_stages: int

    def run(self) -> None:
        """Compile on first use, and launch on the current stream. An empty grid launches nothing."""
        if 0 not in self.grid:
            options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
            self.kernel[self.grid](**self.args, **self.constexprs, **options)
