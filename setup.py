"""The CPU kernels, a library for each instruction set (engine/kernels/cpu). Everything else is in pyproject.toml.

They are no Python modules: engine/kernels/cpu/library.py opens them with ctypes. Without a C++ compiler the
installation goes on, and torch's operations serve instead.
"""

from __future__ import annotations

import platform
from copy import copy
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "engine/kernels/cpu"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]
COMMON = ["-std=c++17", "-O2", "-g0", "-ftree-vectorize", "-fopenmp"]
# GCC 12 warns of the undefined operands of its own AVX512 header.
COMMON += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
FLAGS = {"scalar": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS |= {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"]}


class BuildKernels(build_ext):
    """Names without Python's version in them, and all at once, each in a folder of its own: they share their source."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = True

    def build_extension(self, ext: Extension) -> None:
        own = copy(self)
        own.build_temp = f"{self.build_temp}/{ext.name}"
        super(BuildKernels, own).build_extension(ext)

    def get_ext_filename(self, ext_name: str) -> str:
        return f"{ext_name.replace('.', '/')}.so"


def kernels(name: str, flags: list[str]) -> Extension:
    return Extension(
        f"engine.kernels.cpu._kernels_{name}",
        sources=[f"{FOLDER}/kernels.cpp"],
        depends=sorted(glob(f"{FOLDER}/*.h")),
        extra_compile_args=[*COMMON, *flags],
        extra_link_args=["-fopenmp"],
        optional=True,
        language="c++",
    )


setup(
    ext_modules=[kernels(name, flags) for name, flags in FLAGS.items()],
    cmdclass={"build_ext": BuildKernels},
)
