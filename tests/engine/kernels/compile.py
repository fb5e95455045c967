"""Compile a launch for a card that is not here, and read what came out."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from triton import compile as compile_source
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from engine.backends.cuda.launch import Launch

WARPGROUP_MMA = "HGMMA|QGMMA"
"""Hopper's own matrix products, of 16 and of 8 bits."""

_MAX_SHARED = {80: 166_912, 90: 232_448}
"""Bytes of shared memory that one program can have, by capability."""

_MAX_GRID = (2**31 - 1, 65_535, 65_535)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a kernel became: `registers` of a thread, `shared_bytes` of a program, and the machine code."""

    name: str
    registers: int
    shared_bytes: int
    sass: str = field(repr=False)

    @property
    def spills(self) -> int:
        """Instructions that put a register into local memory or take it back."""
        return len(re.findall(r"\b(?:STL|LDL)\b", self.sass))

    def __str__(self) -> str:
        return f"{self.name}: {self.registers} registers, {self.spills} spills, {self.shared_bytes} bytes shared"


def compiled(launch: Launch, capability: int) -> Compiled:
    """What the JIT would compile for this launch on a card of `capability` (80, 90): the same types, constants for
    ints equal to 1, and divisibility by 16. A meta tensor stands for an aligned one.
    """
    assert all(size <= limit for size, limit in zip(launch.grid, _MAX_GRID, strict=False)), launch.grid
    kernel, target = launch.kernel, GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    arguments = {**launch.args, **launch.constexprs, "num_warps": launch.num_warps, "num_stages": launch.num_stages}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, *source = kernel._pack_args(backend, arguments, bound, specialization, options)
    binary = compile_source(ASTSource(kernel, *source), target=target, options=vars(options))
    usage, sass = _disassemble(binary.asm["cubin"])
    return Compiled(kernel.__name__, usage, binary.metadata.shared, sass)


def assert_fits(compiled: Compiled, capability: int, mma: str | None = None) -> None:
    """Nothing is spilled, shared memory suffices, and the code has an instruction of the pattern `mma`."""
    assert compiled.spills == 0, compiled
    assert compiled.shared_bytes <= _MAX_SHARED[capability], compiled
    assert mma is None or re.search(rf"\b(?:{mma})\b", compiled.sass), f"{compiled}, and no {mma}"


def _disassemble(cubin: bytes) -> tuple[int, str]:
    """Registers of a thread, and SASS, by the tools that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,) = re.findall(r"\bREG:(\d+)", output)
    return int(registers), output
