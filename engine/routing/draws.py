"""Counter-based random numbers on the device: a function of (seed, position, layer, index) and of nothing else.

So a token draws the same numbers in whatever batch it is computed, and again after a preemption. The generator is
SplitMix64's output function (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 16),
applied once a word; torch has 64-bit integers with wrapping arithmetic but no unsigned ones, hence `_shift`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def uniforms(seeds: Tensor, positions: Tensor, layer: int, width: int) -> Tensor:
    """Uniform in [0, 1), 24 random bits: seeds [T] and positions [T] int64 -> [T, width] float32."""
    return (_bits(seeds, positions, layer, width) >> 40 & 0xFFFFFF).float() * 2.0**-24


def normals(seeds: Tensor, positions: Tensor, layer: int, width: int) -> Tensor:
    """Standard normal, by inverting the distribution function: [T, width] float32."""
    # The middle of each of 2^31 intervals: never 0 or 1, whose inverses are infinite.
    fractions = (_bits(seeds, positions, layer, width) >> 33 & 0x7FFFFFFF).double().add(0.5) * 2.0**-31
    return (torch.erfinv(2 * fractions - 1) * math.sqrt(2.0)).float()


def _bits(seeds: Tensor, positions: Tensor, layer: int, width: int) -> Tensor:
    """64 random bits for each of [T, width]."""
    words = _mix(_mix(seeds) ^ positions)
    words = _mix(words ^ layer).unsqueeze(-1)
    return _mix(words ^ torch.arange(width, device=seeds.device))


def _mix(z: Tensor) -> Tensor:
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical shift to the right: torch's is arithmetic, its copies of the sign bit are cleared."""
    return z >> by & (1 << 64 - by) - 1


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - (1 << 64) if word >= 1 << 63 else word
