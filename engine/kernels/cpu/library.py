"""The compiled kernels, through ctypes: one library for each instruction set, and the structures of kernels.cpp."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_void_p
from enum import IntEnum
from functools import cache
from pathlib import Path

_FOLDER = Path(__file__).parent


class InstructionSet(IntEnum):
    """From the plainest to the best."""

    scalar = 0
    avx2 = 1
    avx512 = 2
    avx512_bf16 = 3


class WeightType(IntEnum):
    float32 = 0
    bfloat16 = 1
    int8 = 2


class ModelShape(Structure):
    """`Model` of kernels.cpp."""

    _fields_ = (
        *((name, c_int32) for name in ("hidden", "num_heads", "num_kv_heads", "head_dim", "head_stride")),
        *((name, c_int32) for name in ("num_experts", "intermediate", "window", "weight_type", "cache_type")),
        ("eps", c_float),
    )


class LayerWeights(Structure):
    """`Layer` of kernels.cpp: addresses."""

    _fields_ = tuple(
        (name, c_void_p)
        for name in (
            *("input_norm", "post_norm", "gate"),
            *("qkv", "out", "w13", "w2"),
            *("qkv_scale", "out_scale", "w13_scale", "w2_scale"),
        )
    )


class Step(Structure):
    """`Step` of kernels.cpp."""

    _fields_ = (
        *((name, c_int32) for name in ("num_tokens", "num_seqs", "table_width", "block_size")),
        *((name, c_void_p) for name in ("slot_mapping", "cu_seqlens", "seq_lens", "block_tables", "cos", "sin")),
    )


class Steering(Structure):
    """`Steering` of route.h."""

    _fields_ = (
        *((name, c_void_p) for name in ("slots", "top_k", "min_p", "forbidden")),
        *((name, c_int32) for name in ("num_layers", "max_top_k")),
    )


_SIGNATURES: dict[str, tuple[type | None, tuple[object, ...]]] = {
    "new_workspace": (c_void_p, ()),
    "free_workspace": (None, (c_void_p,)),
    "attention_block": (
        None,
        (POINTER(ModelShape), POINTER(LayerWeights), POINTER(Step), *(c_void_p,) * 6),
    ),
    "route": (None, (c_void_p, *(c_int32,) * 4, POINTER(Steering), c_void_p, c_void_p)),
    "moe_block": (None, (POINTER(ModelShape), POINTER(LayerWeights), c_int32, c_int32, *(c_void_p,) * 5)),
    "linear": (None, (c_void_p, c_int32, c_int32, c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_void_p)),
    "rms_norm": (None, (c_void_p, c_void_p, c_int32, c_int32, c_float, c_void_p)),
    "embed": (None, (c_void_p, c_void_p, c_int32, c_int32, c_void_p, c_int32, c_void_p)),
    "pack": (None, (c_void_p, *(c_int32,) * 7, c_void_p, c_void_p)),
    "supports": (c_int, (c_int,)),
}


@cache
def load(instruction_set: InstructionSet) -> ctypes.CDLL:
    """The library for `instruction_set`. Raises OSError when it was not built."""
    library = ctypes.CDLL(str(_FOLDER / f"_kernels_{instruction_set.name}.so"))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, f"mixserve_{name}")
        function.restype, function.argtypes = result, arguments
        setattr(library, name, function)
    return library


def available() -> list[InstructionSet]:
    """Those that were built and that this machine has, the plainest first."""
    built = [item for item in InstructionSet if (_FOLDER / f"_kernels_{item.name}.so").exists()]
    return [item for item in built if load(built[0]).supports(item)]


def best() -> InstructionSet | None:
    """The best that is available. None where there is nothing but plain C++: torch's own operations are faster."""
    found = available()
    return found[-1] if found and found[-1] is not InstructionSet.scalar else None
