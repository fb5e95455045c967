from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.tiny import TINY_LLAMA, TINY_MIXTRAL, tiny_tensors, write_tiny_mixtral
from tests.tiny_fp8 import AUTOFP8, COMPRESSED_TENSORS, dequantized, write_config, write_tiny_fp8
from tests.weights.test_loader import StackingSink
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig, hf_config, load_config
from weights.errors import CheckpointError
from weights.families import family_of
from weights.loader import load, match
from weights.upcycle import write_mixtral

BF16 = replace(TINY_MIXTRAL, dtype="bfloat16")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.2.w3.weight"


class Recorder:
    def __init__(self) -> None:
        self.found: dict[str, tuple[Tensor, Tensor | None]] = {}

    def prepare(self, piece: Any, tensor: Tensor, scale: Tensor | None = None) -> None:
        self.found[piece.source] = tensor.clone(), scale


def stacked(config: ModelConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that unquantised `tensors` are put together to."""
    sink = StackingSink(config)
    for piece in family_of(config).pieces(config):
        sink.prepare(piece, tensors[piece.source])
    return sink.params


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("layout", "per_channel"), [(COMPRESSED_TENSORS, True), (COMPRESSED_TENSORS, False), (AUTOFP8, False)]
)
def test_weights_are_put_together_with_their_own_scales(
    tmp_path: Path, layout: dict[str, Any], per_channel: bool, scale_dtype: torch.dtype, shards: int
) -> None:
    tensors = write_tiny_fp8(
        tmp_path, BF16, layout=layout, per_channel=per_channel, scale_dtype=scale_dtype, shards=shards
    )
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config == replace(BF16, fp8=True, fp8_experts=True)
    sink = StackingSink(BF16)
    report = load(checkpoint, sink)
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert len(set(sink.sources)) == len(sink.sources) == sum(not name.endswith("_scale") for name in tensors)
    expected = stacked(BF16, dequantized(tensors))
    for name, param in sink.params.items():
        torch.testing.assert_close(param, expected[name], rtol=1e-7, atol=0)  # one rounding of the product
    exact = stacked(BF16, tiny_tensors(BF16))
    for name in ("layers.0.w13", "layers.1.w2", "layers.1.qkv"):
        assert 0.01 < (sink.params[name] - exact[name]).norm() / exact[name].norm() < 0.04, "e4m3 has 3 bits"


def test_what_a_sink_gets(tmp_path: Path) -> None:
    tensors = write_tiny_fp8(tmp_path, BF16, per_channel=False)
    sink = Recorder()
    load(open_checkpoint(tmp_path), sink)
    tensor, scale = sink.found[EXPERT]
    assert tensor.dtype == torch.float8_e4m3fn
    assert torch.equal(tensor.view(torch.uint8), tensors[EXPERT].view(torch.uint8))
    assert scale is not None
    assert (scale.shape, scale.dtype) == ((48, 1), torch.float32)
    assert scale.eq(tensors[f"{EXPERT}_scale"].float()).all()
    assert sink.found["lm_head.weight"][1] is None
    assert sink.found["lm_head.weight"][0].dtype == torch.bfloat16


def test_scales_of_activations_and_of_the_cache_are_left_unread(tmp_path: Path) -> None:
    tensors = write_tiny_fp8(tmp_path, BF16)
    size = sum(tensor.nbytes for tensor in tensors.values())
    for name in list(tensors):
        if name.endswith(".weight_scale"):
            tensors[name.replace("weight_scale", "input_scale")] = torch.full((1,), torch.nan)
    for i in range(BF16.num_layers):
        for name in ("k_scale", "v_scale", "k_proj.output_scale", "v_proj.v_scale"):
            tensors[f"model.layers.{i}.self_attn.{name}"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors")
    sink = StackingSink(BF16)
    assert load(open_checkpoint(tmp_path), sink).num_bytes == size
    assert not any("input_scale" in source for source in sink.sources)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_zero_point",
        "model.layers.0.self_attn.q_proj.weight_scale_inv",
        "model.layers.9.self_attn.k_scale",
        "model.layers.0.mlp.up_proj.input_scale",
        "model.norm.weight_scale",
        "input_scale",
    ],
)
def test_other_tensors_are_still_left_over(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, lambda t: t.update({name: torch.ones(1)}))
    assert message == f"1 tensor left over: {name}"


def test_without_quantization_config_there_is_nothing_of_8_bits(tmp_path: Path) -> None:
    config = write_tiny_mixtral(tmp_path)
    tensors = write_tiny_fp8(tmp_path / "fp8")
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    assert not checkpoint.config.fp8_experts
    with pytest.raises(CheckpointError, match=r"32 tensors of the wrong dtype .* float8_e4m3fn where quantization_con"):
        load(checkpoint, StackingSink(config))
    write_tiny_mixtral(tmp_path)
    tensors = tiny_tensors(config) | {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensor left over: model\.layers\.0\.self_attn\.k_scale"):
        load(open_checkpoint(tmp_path), StackingSink(config))


def refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], object]) -> str:
    """The message about a tiny checkpoint after `change` of its tensors; nothing may reach the sink."""
    tensors = write_tiny_fp8(tmp_path, BF16)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    sink = StackingSink(BF16)
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(tmp_path), sink)
    assert not sink.sources
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_scales(tmp_path: Path) -> None:
    assert refused(tmp_path, lambda t: t.pop(f"{Q_PROJ}_scale")) == f"1 tensor missing: {Q_PROJ}_scale"
    message = refused(tmp_path, lambda t: [t.pop(name) for name in list(t) if name.endswith("_scale")])
    assert message.startswith("32 tensors missing: model.layers.0.self_attn.q_proj.weight_scale, ")


@pytest.mark.parametrize("shape", [(2,), (32,), (1, 32), (16, 1), (32, 2), (32, 1, 1), (1, 1)])
def test_scales_of_the_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    message = refused(tmp_path, lambda t: t.update({f"{Q_PROJ}_scale": torch.ones(shape)}))
    needed = "needs [] or [1] or [32, 1]"
    assert message == f"1 tensor of the wrong shape: {Q_PROJ}_scale (has {list(shape)}, {needed})"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.float8_e8m0fnu], ids=str)
def test_scales_of_the_wrong_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    message = refused(tmp_path, lambda t: t.update({f"{EXPERT}_scale": torch.ones(1).to(dtype)}))
    assert message.startswith("1 tensor of the wrong dtype")
    assert message.endswith(f": {EXPERT}_scale ({dtype})")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.5])
def test_scales_that_nothing_was_calibrated_to(tmp_path: Path, value: float) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{EXPERT}_scale"][47] = value

    message = refused(tmp_path, change)
    assert message == f"1 tensor with values that are not positive and finite: {EXPERT}_scale"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_norms_are_never_of_8_bits(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, lambda t: t.update({name: torch.ones(32).to(torch.float8_e4m3fn)}))
    assert message.endswith(f": {name} (torch.float8_e4m3fn)")


def test_other_floats_of_8_bits_are_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, lambda t: t.update({EXPERT: t[EXPERT].float().to(torch.float8_e5m2)}))
    assert message.endswith(f": {EXPERT} (torch.float8_e5m2)")


@pytest.mark.parametrize(
    ("ignore", "experts"),
    [((), True), (("self_attn",), True), (("experts.3.w2",), False), (("experts",), False)],
    ids=str,
)
def test_the_headers_say_whether_all_experts_are_of_8_bits(
    tmp_path: Path, ignore: tuple[str, ...], experts: bool
) -> None:
    tensors = write_tiny_fp8(tmp_path, BF16, ignore=ignore)
    assert load_config(tmp_path).fp8_experts
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.fp8
    assert checkpoint.config.fp8_experts == experts
    sink = StackingSink(BF16)
    load(checkpoint, sink)
    expected = stacked(BF16, dequantized(tensors))
    assert all(torch.allclose(param, expected[name], rtol=1e-7, atol=0) for name, param in sink.params.items())


def test_a_checkpoint_of_16_bits_has_none() -> None:
    assert not TINY_MIXTRAL.fp8
    assert not TINY_MIXTRAL.fp8_experts


def test_a_dense_checkpoint_of_8_bits_can_be_upcycled(tmp_path: Path) -> None:
    """The experts are written as what the dense weights stand for."""
    dense = replace(TINY_LLAMA, dtype="bfloat16")
    tensors = dequantized(write_tiny_fp8(tmp_path / "dense", dense))
    checkpoint = open_checkpoint(tmp_path / "dense")
    assert checkpoint.config.fp8_experts
    gate = torch.randn(3, dense.hidden_size)
    write_mixtral(checkpoint, tmp_path / "out", routers=[gate] * dense.num_layers, num_experts=3)
    written = open_checkpoint(tmp_path / "out")
    assert not written.config.fp8
    match(written)
    sink = Recorder()
    load(written, sink)
    up, down = (tensors[f"model.layers.1.mlp.{name}_proj.weight"].bfloat16() for name in ("up", "down"))
    for e in range(3):
        assert torch.equal(sink.found[f"model.layers.1.block_sparse_moe.experts.{e}.w3.weight"][0], up)
        assert torch.equal(sink.found[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"][0], down)


def test_a_config_of_8_bits_is_not_written(tmp_path: Path) -> None:
    write_config(tmp_path, BF16, COMPRESSED_TENSORS)
    with pytest.raises(AssertionError):
        hf_config(load_config(tmp_path))
