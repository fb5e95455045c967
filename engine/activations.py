"""What the intermediate tensors of a step take at most, by backend, computed from the model's configuration.

Dimensions as in engine/backends/base.py; T tokens of a step, K the most experts that a request may ask for, A = T*K
assignments, R = min(T, max_num_seqs) rows that are sampled, s bytes an element of the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from weights.config import ModelConfig

ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes an element, by dtype name."""

MAX_GRAPH_BATCH = 512
"""The largest batch of decodes that a CUDA graph is captured of."""

_WORKSPACE = 32 << 20
"""What cuBLAS takes at its first product on Hopper."""

_SMS = 132
"""Multiprocessors of Hopper: with more of them, long contexts are cut into more segments."""

_SAMPLING = 44
"""Bytes a row and word of the vocabulary: float32 logits as made, adjusted, scaled, filtered, sorted with indices,
running sums."""

_GROUPED_ABOVE = 512
"""Tokens above which torch's grouped products may take the experts (engine/backends/cuda/tiles.txt)."""

_GROUPED_BLOCK = 16
"""Places that an expert's rows are padded to for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSize:
    """What the size of a step depends on."""

    dtype: str
    quantization: str | None
    """Of the experts' weights."""
    num_tokens: int
    """T"""
    num_seqs: int
    """Sequences that may run at once."""
    context: int
    """Tokens of the longest sequence."""
    num_choices: int
    """K"""

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.dtype]

    @property
    def num_sampled(self) -> int:
        """R"""
        return min(self.num_tokens, self.num_seqs)


def activation_bytes(config: ModelConfig, step: StepSize, *, backend: str) -> int:
    """Estimated peak of a step: of the kernels on backend cuda, of torch's operations on others."""
    return _cuda_step_bytes(config, step) if backend == "cuda" else _torch_step_bytes(config, step)


def graph_bytes(config: ModelConfig, step: StepSize, *, backend: str) -> int:
    """Estimated memory pool of the CUDA graphs, which only backend cuda has: the forward pass of the largest batch of
    decodes, logits included. Smaller batches fit into the same memory.

    Example, Mixtral 8x7B in bfloat16, 256 sequences, K = 8: experts 2048 * (14336 + 4096) * 2 bytes = 75.5 MB are more
    than logits of 256 * 32000 * 6 = 49.2 MB, and x, its norm and the angles take 256 * 16,896 = 4.3 MB: 79.8 MB.
    """
    if backend != "cuda":
        return 0
    rows = min(step.num_sampled, MAX_GRAPH_BATCH)
    logits = rows * config.vocab_size * (step.itemsize + 4)
    moments = _attention_bytes(config, step, rows, decode=True), _expert_bytes(config, step, rows), logits
    return _residual_bytes(config, step, rows) + max(moments)


def _cuda_step_bytes(config: ModelConfig, step: StepSize) -> int:
    """A layer's tensors are freed before the next layer's, so the peak is one of three moments, each beside the
    residual stream, its norm, and cosine and sine of the positions, T * (2D * s + 4N):

        attention   T * (qkv (H + 2G)N, outputs HN, projected D) * s, and partial outputs of long contexts
        experts     A * (middle F, product D) * s by the kernels. By torch's grouped products, whose rows are the
                    P = A + 16E places of the blocks, P * (gate and up 2F, middle F, product D) * s, or with e4m3,
                    where gate and up and the product have 2 bytes and the middle 1, P * (5F + 2D)
        sampling    R * (44V + D * s)

    Add cuBLAS's workspace and the routing record, 16 bytes * L * T * E.

    Example, Mixtral 8x7B in bfloat16, T = 2048, 256 sequences, K = 8: the experts are the largest moment, with P =
    16,384 + 128 places of (3 * 14336 + 4096) * 2 = 94,208 bytes, 1,555.6 MB. Beside them 2048 * 16,896 = 34.6 MB, the
    workspace of 33.6 MB, the record of 8.4 MB: 1,632 MB.
    """
    tokens = step.num_tokens
    sampling = step.num_sampled * (config.vocab_size * _SAMPLING + config.hidden_size * step.itemsize)
    moments = _attention_bytes(config, step, tokens, decode=False), _expert_bytes(config, step, tokens), sampling
    record = 16 * config.num_layers * tokens * config.num_experts
    return _residual_bytes(config, step, tokens) + max(moments) + _WORKSPACE + record


def _residual_bytes(config: ModelConfig, step: StepSize, tokens: int) -> int:
    return tokens * (2 * config.hidden_size * step.itemsize + 4 * config.head_dim)


def _attention_bytes(config: ModelConfig, step: StepSize, tokens: int, *, decode: bool) -> int:
    """Where programs are few, each takes a segment of the context, and its rows wait in float32 to be added up: see
    `num_segments` of engine/backends/cuda/attention.py."""
    group = config.num_heads // config.num_kv_heads
    rows, wanted = (group, 4 * _SMS) if decode else (128, _SMS)
    programs = max(1, tokens * group // rows) * config.num_kv_heads
    num_segments = min(2 * wanted // programs, step.context // 256, 64)
    segments = programs * num_segments * rows * (config.head_dim + 2) * 4 if num_segments > 1 else 0
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return tokens * (2 * q_width + 2 * kv_width + config.hidden_size) * step.itemsize + segments


def _expert_bytes(config: ModelConfig, step: StepSize, tokens: int) -> int:
    rows, hidden, ffn = tokens * step.num_choices, config.hidden_size, config.intermediate_size
    if tokens <= _GROUPED_ABOVE or step.dtype != "bfloat16" or step.quantization == "int8":
        return rows * (ffn + hidden) * step.itemsize
    places = rows + _GROUPED_BLOCK * config.num_experts
    return places * (5 * ffn + 2 * hidden if step.quantization == "fp8" else (3 * ffn + hidden) * 2)


def _torch_step_bytes(config: ModelConfig, step: StepSize) -> int:
    """The peak is one of three moments here too. They are counted in elements of the dtype unless a size is given; C is
    the longest sequence:

        attention   T * (residual D, norm D, qkv (H+2G)N, rotated and folded 2HN+GN, outputs 2HN)
                    and, for a chunk at the end of the longest sequence, C * 2GN gathered keys and values
                    and min(T, C) * C * H/G places of the mask, once as 1 byte and once in the dtype
        experts     T * (residual D, norm D), and for each of T * K rows grouped by expert the larger of
                    input D, gate and up 2F, silu F, product F    and
                    input D, gate and up 2F, w2 D, ungrouped D, and 3D in float32 while they are summed
        sampling    R * V * 44 bytes: logits as made, adjusted, scaled, filtered, sorted with indices, running sums

    Example, Mixtral 8x7B in bfloat16 with T = 2048, C = 4096 and K = 2: the experts are the largest moment, with 4096
    rows of 3*4096*2 + 2*14336*2 + 3*4096*4 = 131,072 bytes and 2048 of 2*4096*2, together 570 MB.
    """
    size, tokens, hidden, ffn = step.itemsize, step.num_tokens, config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    mask = min(tokens, step.context) * step.context * config.num_heads // config.num_kv_heads
    attention = (
        tokens * (2 * hidden + 5 * q_width + 3 * kv_width) * size
        + step.context * 2 * kv_width * size
        + mask * (1 + size)
    )
    expert_row = max((hidden + 4 * ffn) * size, (3 * hidden + 2 * ffn) * size + 3 * hidden * 4)
    experts = tokens * (2 * hidden * size + step.num_choices * expert_row)
    return max(attention, experts, step.num_sampled * config.vocab_size * _SAMPLING)
