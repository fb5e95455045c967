from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from tests.tiny import TINY_LLAMA, TINY_MIXTRAL, tiny_tensors
from tests.weights.gguf_files import write_gguf
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig
from weights.errors import CheckpointError, ConfigError
from weights.gguf import hf_names, rotary_halves
from weights.loader import match

# Rows of quantised tensors are multiples of 32 values.
DENSE = replace(TINY_LLAMA, num_heads=3, num_kv_heads=1, head_dim=32, hidden_size=96, intermediate_size=64)
SPARSE = replace(TINY_MIXTRAL, num_heads=6, num_kv_heads=2, head_dim=10, intermediate_size=64, num_experts=3)


def q4_1(name: str) -> Kind:
    """What the demo's file has: Q8_0 embeddings, float32 norms, the rest Q4_1."""
    return Kind.Q8_0 if "embed" in name else Kind.F32 if "norm" in name else Kind.Q4_1


def f16(name: str) -> Kind:
    return Kind.F32 if "norm" in name else Kind.F16


def bf16(name: str) -> Kind:
    return Kind.F32 if "norm" in name else Kind.BF16


@pytest.mark.parametrize("quantization", [lambda _: Kind.F32, f16, bf16, q4_1], ids=["f32", "f16", "bf16", "q4_1"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_dense_file(tmp_path: Path, quantization: Callable[[str], Kind], tied: bool) -> None:
    config = replace(DENSE, tie_word_embeddings=tied)
    expected = write_gguf(tmp_path / "x.gguf", config, tiny_tensors(config), quantization=quantization)
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.config == config
    assert checkpoint.path == tmp_path / "x.gguf"
    match(checkpoint)
    names = []
    for name, tensor in checkpoint.read():
        info = checkpoint.tensors[name]
        assert (tuple(tensor.shape), tensor.dtype, tensor.nbytes) == (info.shape, torch.float32, info.nbytes)
        assert torch.equal(tensor, expected[name]), name
        names.append(name)
    assert names == list(checkpoint.tensors)
    assert sorted(names) == sorted(expected)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("num_experts", [3, 1])
def test_a_file_with_experts(tmp_path: Path, stacked: bool, num_experts: int) -> None:
    config = replace(SPARSE, num_experts=num_experts, num_experts_per_tok=1)

    def experts_q8(name: str) -> Kind:
        return Kind.Q8_0 if "experts" in name else Kind.F32

    expected = write_gguf(tmp_path / "x.gguf", config, tiny_tensors(config), quantization=experts_q8, stacked=stacked)
    checkpoint = open_checkpoint(tmp_path / "x.gguf")
    assert checkpoint.config == config
    match(checkpoint)
    read = dict(checkpoint.read())
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


def test_transformers_reads_the_same_values(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    def with_tokenizer(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list([f"t{i}" for i in range(64)])

    write_gguf(tmp_path / "x.gguf", DENSE, tiny_tensors(DENSE), quantization=q4_1, edit=with_tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    theirs = model.state_dict()
    ours = dict(open_checkpoint(tmp_path / "x.gguf").read())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_rotary_rows_by_hand() -> None:
    rows = torch.tensor([[0.0], [2.0], [1.0], [3.0], [10.0], [12.0], [11.0], [13.0]])  # two heads of four
    assert rotary_halves(rows, 2).flatten().tolist() == [0, 1, 2, 3, 10, 11, 12, 13]
    with pytest.raises(CheckpointError, match="8 rows does not divide into 3 heads"):
        rotary_halves(rows, 3)


def test_names() -> None:
    assert hf_names("blk.10.ffn_down_exps.weight", 2) == [
        "model.layers.10.block_sparse_moe.experts.0.w2.weight",
        "model.layers.10.block_sparse_moe.experts.1.w2.weight",
    ]
    assert hf_names("blk.0.ffn_up.7.weight", 1) == ["model.layers.0.block_sparse_moe.experts.7.w3.weight"]
    assert hf_names("blk.0.ffn_gate_inp.weight", 1) == ["model.layers.0.block_sparse_moe.gate.weight"]
    for unknown in ("blk.0.attn_q.bias", "blk.x.attn_q.weight", "blk.0.ffn_gate_shexp.weight", "other"):
        assert hf_names(unknown, 1) == [unknown]


def test_metadata_is_optional_where_it_can_be_told(tmp_path: Path) -> None:
    def end_ids(writer: gguf.GGUFWriter) -> None:
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(5)
        writer.add_bos_token_id(1)

    write_gguf(tmp_path / "x.gguf", DENSE, tiny_tensors(DENSE), edit=end_ids)
    config = open_checkpoint(tmp_path / "x.gguf").config
    assert (config.eos_token_ids, config.bos_token_id, config.rms_norm_eps) == ((2, 5), 1, 1e-5)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), "rope scaling is not supported"),
        (lambda w: w.add_tensor("rope_freqs.weight", torch.ones(4).numpy()), "rope scaling is not supported"),
        (lambda w: w.add_uint32("llama.attention.sliding_window", 0), "sliding_window must be an integer"),
    ],
)
def test_features_that_are_not_supported(
    tmp_path: Path, edit: Callable[[gguf.GGUFWriter], object], message: str
) -> None:
    write_gguf(tmp_path / "x.gguf", DENSE, tiny_tensors(DENSE), edit=edit)
    with pytest.raises(ConfigError, match=rf"x\.gguf: {message}"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (replace(SPARSE, num_experts_per_tok=4), "num_experts_per_tok"),
        (replace(SPARSE, num_kv_heads=4), "num_key_value"),
    ],
)
def test_sizes_are_checked(tmp_path: Path, config: ModelConfig, field: str) -> None:
    write_gguf(tmp_path / "x.gguf", config, tiny_tensors(config))
    with pytest.raises(ConfigError, match=rf"x\.gguf: .*{field}"):
        open_checkpoint(tmp_path / "x.gguf")


def test_the_vocabulary_is_as_large_as_the_embedding(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", replace(DENSE, vocab_size=1), tiny_tensors(DENSE))
    assert open_checkpoint(tmp_path / "x.gguf").config.vocab_size == DENSE.vocab_size


def test_tensors_missing_and_left_over(tmp_path: Path) -> None:
    tensors = tiny_tensors(DENSE)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_gguf(tmp_path / "x.gguf", DENSE, tensors)
    with pytest.raises(CheckpointError, match=r"1 tensor missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        match(open_checkpoint(tmp_path / "x.gguf"))
    tensors = tiny_tensors(DENSE)
    write_gguf(
        tmp_path / "y.gguf", DENSE, tensors, edit=lambda w: w.add_tensor("blk.0.attn_q.bias", torch.ones(96).numpy())
    )
    with pytest.raises(CheckpointError, match=r"1 tensor left over: blk\.0\.attn_q\.bias"):
        match(open_checkpoint(tmp_path / "y.gguf"))
    del tensors["model.embed_tokens.weight"]
    write_gguf(tmp_path / "z.gguf", DENSE, tensors)
    with pytest.raises(CheckpointError, match=r"'token_embd\.weight' is missing"):
        open_checkpoint(tmp_path / "z.gguf")


def test_another_architecture(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="architecture 'gemma' is not supported; known: llama"):
        open_checkpoint(tmp_path / "x.gguf")
