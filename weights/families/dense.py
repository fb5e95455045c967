"""Dense Llama and Mistral checkpoints, read as a mixture of one expert: what sparse upcycling starts from.

With one expert and top-1, renormalised routing weights are 1, so the mixture computes exactly the dense block, whatever
the gate holds. A dense checkpoint has no gate: whoever loads one fills it (`upcycle` uses zeros).
"""

from __future__ import annotations

from weights.config import ModelConfig
from weights.families.mixtral import shared_pieces
from weights.params import Piece


def pieces(config: ModelConfig) -> tuple[Piece, ...]:
    """Every tensor of a dense checkpoint and the parameter rows it fills. `config.num_experts` is 1."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    result = shared_pieces(config)
    for i in range(config.num_layers):
        source, param = f"model.layers.{i}.mlp", f"layers.{i}"
        result += [
            Piece(f"{source}.gate_proj.weight", (ffn, hidden), f"{param}.w13", expert=0),
            Piece(f"{source}.up_proj.weight", (ffn, hidden), f"{param}.w13", expert=0, row=ffn),
            Piece(f"{source}.down_proj.weight", (hidden, ffn), f"{param}.w2", expert=0),
        ]
    return tuple(result)
