"""Mixtral: parameters of the engine and tensor names of a Hugging Face checkpoint (995 of them in 8x7B)."""

from __future__ import annotations

from weights.config import ModelConfig
from weights.params import ParamKind, ParamSpec, Piece


def param_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter of the decoder, in the order of the forward pass, in the reference layout.

    A tied `lm_head` is not a parameter of its own. With H heads, KV heads and head size hd:
    qkv [(H + 2*KV)*hd, D], o [D, H*hd], gate [E, D], w13 [E, 2F, D] (gate rows, then up rows), w2 [E, D, F].
    """
    hidden, ffn, experts = config.hidden_size, config.intermediate_size, config.num_experts
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    specs = [ParamSpec("embed_tokens", (config.vocab_size, hidden), ParamKind.EMBEDDING)]
    for i in range(config.num_layers):
        layer = f"layers.{i}"
        specs += [
            ParamSpec(f"{layer}.input_norm", (hidden,), ParamKind.NORM),
            ParamSpec(f"{layer}.qkv", (q_rows + 2 * kv_rows, hidden), ParamKind.ATTENTION),
            ParamSpec(f"{layer}.o", (hidden, q_rows), ParamKind.ATTENTION),
            ParamSpec(f"{layer}.post_attention_norm", (hidden,), ParamKind.NORM),
            ParamSpec(f"{layer}.gate", (experts, hidden), ParamKind.ROUTER),
            *_noise_gate(config, layer),
            ParamSpec(f"{layer}.w13", (experts, 2 * ffn, hidden), ParamKind.EXPERT),
            ParamSpec(f"{layer}.w2", (experts, hidden, ffn), ParamKind.EXPERT),
        ]
    specs.append(ParamSpec("norm", (hidden,), ParamKind.NORM))
    if not config.tie_word_embeddings:
        specs.append(ParamSpec("lm_head", (config.vocab_size, hidden), ParamKind.LM_HEAD))
    return tuple(specs)


def _noise_gate(config: ModelConfig, layer: str) -> list[ParamSpec]:
    if config.router_type != "noisy_topk":
        return []
    return [ParamSpec(f"{layer}.gate_noise", (config.num_experts, config.hidden_size), ParamKind.ROUTER)]


def shared_pieces(config: ModelConfig) -> list[Piece]:
    """The tensors that Mixtral has in common with the dense Llama family: all but the feed-forward block."""
    hidden, vocab = config.hidden_size, config.vocab_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    pieces = [Piece("model.embed_tokens.weight", (vocab, hidden), "embed_tokens")]
    for i in range(config.num_layers):
        source, param = f"model.layers.{i}", f"layers.{i}"
        pieces += [
            Piece(f"{source}.input_layernorm.weight", (hidden,), f"{param}.input_norm"),
            Piece(f"{source}.self_attn.q_proj.weight", (q_rows, hidden), f"{param}.qkv"),
            Piece(f"{source}.self_attn.k_proj.weight", (kv_rows, hidden), f"{param}.qkv", row=q_rows),
            Piece(f"{source}.self_attn.v_proj.weight", (kv_rows, hidden), f"{param}.qkv", row=q_rows + kv_rows),
            Piece(f"{source}.self_attn.o_proj.weight", (hidden, q_rows), f"{param}.o"),
            Piece(f"{source}.post_attention_layernorm.weight", (hidden,), f"{param}.post_attention_norm"),
        ]
    pieces.append(Piece("model.norm.weight", (hidden,), "norm"))
    if not config.tie_word_embeddings:
        pieces.append(Piece("lm_head.weight", (vocab, hidden), "lm_head"))
    return pieces


def pieces(config: ModelConfig) -> tuple[Piece, ...]:
    """Every tensor of a Mixtral checkpoint and the parameter rows it fills."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    result = shared_pieces(config)
    for i in range(config.num_layers):
        source, param = f"model.layers.{i}.block_sparse_moe", f"layers.{i}"
        result.append(Piece(f"{source}.gate.weight", (config.num_experts, hidden), f"{param}.gate"))
        for e in range(config.num_experts):
            expert = f"{source}.experts.{e}"
            result += [
                Piece(f"{expert}.w1.weight", (ffn, hidden), f"{param}.w13", expert=e),
                Piece(f"{expert}.w3.weight", (ffn, hidden), f"{param}.w13", expert=e, row=ffn),
                Piece(f"{expert}.w2.weight", (hidden, ffn), f"{param}.w2", expert=e),
            ]
    return tuple(result)


def optional(config: ModelConfig) -> tuple[Piece, ...]:
    """The noise gates of a noisy router: a checkpoint without them gets noise of scale 1."""
    if config.router_type != "noisy_topk":
        return ()
    shape = (config.num_experts, config.hidden_size)
    return tuple(
        Piece(f"model.layers.{i}.block_sparse_moe.gate.noise.weight", shape, f"layers.{i}.gate_noise")
        for i in range(config.num_layers)
    )


def is_extra(config: ModelConfig, name: str) -> bool:
    """Known left-overs: old rotary buffers, and an lm_head that only repeats tied embeddings, with its scales."""
    repeated = ("lm_head.weight", *(("lm_head.weight_scale", "lm_head.input_scale") if config.fp8 else ()))
    return name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name in repeated)
