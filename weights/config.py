"""config.json -> ModelConfig. The schema is our own: unknown keys are ignored and nothing of a checkpoint is executed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of one mixture-of-experts decoder.

    Sizes are counts (not bytes); `rope_theta` is the rotary base; `sliding_window` is in tokens, None for full attention.
    `num_experts` = E, `num_experts_per_tok` = K, `hidden_size` = D, `intermediate_size` = F, `vocab_size` = V.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    num_experts: int
    num_experts_per_tok: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    """The dtype the checkpoint says it holds: float32, float16 or bfloat16."""
    router_type: str = "topk_softmax"
    norm_topk_prob: bool = True
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def is_sparse(self, layer: int) -> bool:
        """Whether `layer` routes to experts. Every Mixtral layer does."""
        return self.num_experts > 0
