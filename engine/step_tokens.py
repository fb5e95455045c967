"""How many tokens a step may have where nobody says so: on a GPU as many as keep it busy, and hardly more."""

from __future__ import annotations

from dataclasses import dataclass

from weights.config import ModelConfig

_UNKNOWN_GPU = 2048

_CPU = 160
"""A tenth to a quarter of a second of work for a small model, and running requests wait for it."""

_MULTIPLE = 128
_FEWEST, _MOST = 256, 8192


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a card really reaches with 16-bit products, and what it copies."""

    flops: float
    """A second."""
    bandwidth: float
    """Bytes a second."""


ROOFLINES = {"NVIDIA H100 80GB HBM3": Roofline(800e12, 3.0e12), "NVIDIA H200": Roofline(800e12, 4.3e12)}
"""By the name that CUDA has for a card. FLOP/s are about 80 % of the data sheet's."""


def default_step_tokens(
    config: ModelConfig,
    *,
    device: str,
    card: str | None = None,
    quantization: str | None = None,
    max_num_seqs: int = 1,
) -> int:
    """The token budget of a step on `device`, cpu or cuda, for 16-bit activations. `card`: the GPU's name.

    On a card that is known: where the experts turn from being bound by memory to being bound by products, rounded up to
    a multiple of 128. Fewer tokens would read the weights more often than they need to be; more make the decodes in the
    step wait without making its prompts any faster. On such a card never fewer than `max_num_seqs`, all of which may
    decode.
    """
    if device != "cuda":
        return _CPU
    roofline = ROOFLINES.get(card or "")
    if roofline is None:
        return _UNKNOWN_GPU
    tokens = -(-compute_bound_tokens(config, roofline, quantization) // _MULTIPLE) * _MULTIPLE
    return max(min(max(int(tokens), _FEWEST), _MOST), max_num_seqs)


def compute_bound_tokens(config: ModelConfig, roofline: Roofline, quantization: str | None) -> float:
    """Tokens T from which a layer's experts take longer to multiply than to read, when all of them are used.

    T tokens take 2 * T * K * P operations, the E experts of P parameters are E * P * w bytes of w a weight: both take
    as long when T = flops / bandwidth * E * w / (2K). fp8 weights have w = 1, but are multiplied twice as fast, by
    activations of fp8 too; int8 ones are widened to 16 bits and multiplied as those.

    Example, Mixtral 8x7B (E = 8, K = 2) in bfloat16: 800e12 / 3.0e12 = 267 operations a byte on an H100, times
    8 * 2 / 4: 1,067 tokens; on an H200 186 * 4 = 744. In fp8 the same, in int8 half.
    """
    faster = 2 if quantization == "fp8" else 1
    width = 2 if quantization is None else 1
    operations_a_byte = faster * roofline.flops / roofline.bandwidth
    return operations_a_byte * config.num_experts * width / (2 * config.num_experts_per_tok)
