from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest

from tests.tiny import TINY_LLAMA, TINY_MIXTRAL
from tests.weights.test_config import MIXTRAL_8X7B
from weights.config import ModelConfig, parse_config
from weights.errors import ConfigError
from weights.families import FAMILIES, family_of
from weights.families.mixtral import param_specs


def test_mixtral_8x7b_has_995_tensors_and_its_parameters() -> None:
    config = parse_config(MIXTRAL_8X7B)
    pieces = family_of(config).pieces(config)
    assert len(pieces) == len({piece.source for piece in pieces}) == 995
    assert sum(math.prod(piece.shape) for piece in pieces) == 46_702_792_704
    assert sum(math.prod(spec.shape) for spec in param_specs(config)) == 46_702_792_704


@pytest.mark.parametrize(
    "config",
    [
        TINY_MIXTRAL,
        replace(TINY_MIXTRAL, num_heads=6, num_kv_heads=3, head_dim=10, num_experts=5, tie_word_embeddings=True),
    ],
)
def test_pieces_fill_every_row_of_every_parameter_once(config: ModelConfig) -> None:
    rows = Counter(
        (piece.param, piece.expert, row)
        for piece in family_of(config).pieces(config)
        for row in range(piece.row, piece.row + piece.shape[0])
    )
    expected = Counter(
        (spec.name, expert, row)
        for spec in param_specs(config)
        for expert in (range(spec.shape[0]) if len(spec.shape) == 3 else [None])
        for row in range(spec.shape[-2] if len(spec.shape) > 1 else spec.shape[0])
    )
    assert rows == expected


def test_a_dense_model_fills_all_but_the_gate() -> None:
    params = {piece.param for piece in family_of(TINY_LLAMA).pieces(TINY_LLAMA)}
    assert {spec.name for spec in param_specs(TINY_LLAMA)} - params == {"layers.0.gate", "layers.1.gate"}


def test_known_extras() -> None:
    is_extra = FAMILIES["mixtral"].is_extra
    assert is_extra(TINY_MIXTRAL, "model.layers.0.self_attn.rotary_emb.inv_freq")
    assert not is_extra(TINY_MIXTRAL, "lm_head.weight")
    tied = replace(TINY_MIXTRAL, tie_word_embeddings=True)
    assert is_extra(tied, "lm_head.weight")
    for name in ("lm_head.weight_scale", "lm_head.input_scale"):
        assert is_extra(replace(tied, fp8=True), name)
        assert not is_extra(tied, name), "nothing has scales"
        assert not is_extra(replace(TINY_MIXTRAL, fp8=True), name)
    assert not is_extra(replace(tied, fp8=True), "lm_head.bias")


def test_an_unknown_family() -> None:
    with pytest.raises(ConfigError, match="model_type 'other' is not supported"):
        family_of(replace(TINY_MIXTRAL, model_type="other"))
