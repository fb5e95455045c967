from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny import TINY_LLAMA, tiny_tensors, write_tiny_mixtral
from weights import loader
from weights.checkpoint import open_checkpoint
from weights.config import ModelConfig
from weights.errors import CheckpointError
from weights.families.mixtral import param_specs
from weights.loader import load
from weights.params import Piece


class StackingSink:
    """Puts pieces together as the reference layout says, in float32."""

    def __init__(self, config: ModelConfig) -> None:
        self.params = {spec.name: torch.full(spec.shape, torch.nan) for spec in param_specs(config)}
        self.sources: list[str] = []

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        assert tuple(tensor.shape) == piece.shape
        assert (scale is not None) == (tensor.dtype == torch.float8_e4m3fn)
        self.sources.append(piece.source)
        target = self.params[piece.param]
        rows = target if piece.expert is None else target[piece.expert]
        rows[piece.row : piece.row + piece.shape[0]] = tensor.float() if scale is None else tensor.float() * scale


@pytest.mark.parametrize(("dtype", "shards"), [("float32", 1), ("bfloat16", 4), ("float16", 3)])
def test_parameters_are_stacked_from_pieces(tmp_path: Path, dtype: str, shards: int) -> None:
    config = write_tiny_mixtral(tmp_path, dtype=dtype, shards=shards, num_heads=3, num_kv_heads=1, num_experts=5)
    sink = StackingSink(config)
    report = load(open_checkpoint(tmp_path), sink)
    tensors = {name: tensor.float() for name, tensor in tiny_tensors(config).items()}
    assert sorted(sink.sources) == sorted(tensors)
    assert report.num_bytes == sum(t.nbytes for t in tensors.values()) * getattr(torch, dtype).itemsize // 4
    assert report.seconds > 0
    layer = "model.layers.1"
    qkv = torch.cat([tensors[f"{layer}.self_attn.{x}_proj.weight"] for x in "qkv"])
    assert torch.equal(sink.params["layers.1.qkv"], qkv)
    for e in range(5):
        w1, w2, w3 = (tensors[f"{layer}.block_sparse_moe.experts.{e}.w{i}.weight"] for i in (1, 2, 3))
        assert torch.equal(sink.params["layers.1.w13"][e], torch.cat([w1, w3]))
        assert torch.equal(sink.params["layers.1.w2"][e], w2)
    assert not any(param.isnan().any() for param in sink.params.values())


def test_a_dense_model_is_one_expert_without_a_gate(tmp_path: Path) -> None:
    config = write_tiny_mixtral(tmp_path, TINY_LLAMA)
    sink = StackingSink(config)
    load(open_checkpoint(tmp_path), sink)
    up = tiny_tensors(config)["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(sink.params["layers.0.w13"][0, 48:], up)
    assert sink.params["layers.0.gate"].isnan().all()


def refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], **overrides: Any) -> str:
    """The message about a tiny checkpoint after `change` of its tensors; nothing may reach the sink."""
    config = write_tiny_mixtral(tmp_path, **overrides)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    sink = StackingSink(config)
    with pytest.raises(CheckpointError) as caught:
        load(open_checkpoint(tmp_path), sink)
    assert not sink.sources
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_tensors(tmp_path: Path) -> None:
    assert refused(tmp_path, lambda t: t.pop("model.norm.weight")) == "1 tensor missing: model.norm.weight"
    message = refused(tmp_path, lambda t: [t.pop(name) for name in list(t) if ".experts.3." in name])
    assert message.startswith("6 tensors missing: model.layers.0.block_sparse_moe.experts.3.w1.weight, ")
    assert message.endswith(", …")
    assert message.count(".weight") == 3


def test_tensors_left_over(tmp_path: Path) -> None:
    assert refused(tmp_path, lambda t: t.update(surprise=torch.ones(1))) == "1 tensor left over: surprise"
    name = "model.layers.2.input_layernorm.weight"
    assert name in refused(tmp_path, lambda t: t.update({name: torch.ones(32)}))
    name = "model.layers.0.self_attn.q_proj.bias"
    assert name in refused(tmp_path, lambda t: t.update({name: torch.ones(32)}))


def test_known_extras_are_left_unread(tmp_path: Path) -> None:
    config = write_tiny_mixtral(tmp_path, tie_word_embeddings=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones(64, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float64)
    save_file(tensors, tmp_path / "model.safetensors")
    sink = StackingSink(config)
    report = load(open_checkpoint(tmp_path), sink)
    assert sorted(sink.sources) == sorted(tiny_tensors(config))
    assert report.num_bytes == sum(tensor.nbytes for tensor in tiny_tensors(config).values())


def test_an_untied_head_must_be_there(tmp_path: Path) -> None:
    assert refused(tmp_path, lambda t: t.pop("lm_head.weight")) == "1 tensor missing: lm_head.weight"


NOISE_GATE = "model.layers.1.block_sparse_moe.gate.noise.weight"


@pytest.mark.parametrize("present", [False, True])
def test_the_noise_gates_of_a_noisy_router_may_be_there(tmp_path: Path, present: bool) -> None:
    config = write_tiny_mixtral(tmp_path, router_type="noisy_topk")
    tensors = load_file(tmp_path / "model.safetensors")
    noise = torch.arange(128.0).view(4, 32)
    if present:
        tensors[NOISE_GATE] = noise
        save_file(tensors, tmp_path / "model.safetensors")
    sink = StackingSink(config)
    report = load(open_checkpoint(tmp_path), sink)
    assert (NOISE_GATE in sink.sources) == present
    assert report.num_bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert sink.params["layers.0.gate_noise"].isnan().all()
    if present:
        assert torch.equal(sink.params["layers.1.gate_noise"], noise)


def test_a_noise_gate_must_fit_and_belong_to_a_noisy_router(tmp_path: Path) -> None:
    message = refused(tmp_path, lambda t: t.update({NOISE_GATE: torch.ones(4, 31)}), router_type="noisy_topk")
    assert message == f"1 tensor of the wrong shape: {NOISE_GATE} (has [4, 31], needs [4, 32])"
    name = NOISE_GATE.replace("layers.1", "layers.2")
    assert name in refused(tmp_path, lambda t: t.update({name: torch.ones(4, 32)}), router_type="noisy_topk")
    assert NOISE_GATE in refused(tmp_path, lambda t: t.update({NOISE_GATE: torch.ones(4, 32)}))


@pytest.mark.parametrize("shape", [(32, 64), (64, 31), (2048,), (64, 32, 1)])
def test_wrong_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    message = refused(tmp_path, lambda t: t.update({"lm_head.weight": torch.ones(shape)}))
    assert message == f"1 tensor of the wrong shape: lm_head.weight (has {list(shape)}, needs [64, 32])"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_wrong_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    message = refused(tmp_path, lambda t: t.update({"model.norm.weight": torch.ones(32).to(dtype)}))
    assert message.startswith("1 tensor of the wrong dtype")
    assert message.endswith(f": model.norm.weight ({dtype})")


def test_progress_shows_bytes_and_rate_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_tiny_mixtral(tmp_path)
    load(open_checkpoint(tmp_path), StackingSink(config))
    assert capsys.readouterr() == ("", "")
    load(open_checkpoint(tmp_path), StackingSink(config), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "Loading weights: 100%" in err
    assert "190k/190k" in err
    assert "B/s]" in err


class FailingSink:
    left = 5

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        assert tensor.numel()
        assert scale is None
        self.left -= 1
        if not self.left:
            raise MemoryError(piece.param)


def test_what_the_sink_raises_ends_the_load(tmp_path: Path) -> None:
    write_tiny_mixtral(tmp_path, shards=3)
    sink, threads = FailingSink(), threading.active_count()
    with pytest.raises(MemoryError, match=r"layers\.0"):
        load(open_checkpoint(tmp_path), sink)
    assert sink.left == 0
    assert threading.active_count() == threads


def test_a_file_cut_short_ends_the_load(tmp_path: Path) -> None:
    config = write_tiny_mixtral(tmp_path, shards=3)
    checkpoint = open_checkpoint(tmp_path)
    last = tmp_path / "model-00003-of-00003.safetensors"
    os.truncate(last, last.stat().st_size // 2)
    sink, threads = StackingSink(config), threading.active_count()
    with pytest.raises(CheckpointError, match=r"model-00003-of-00003\.safetensors: has .* when its header was read"):
        load(checkpoint, sink)
    assert not sink.sources
    assert threading.active_count() == threads


class Event:
    """Of a copy that is done when it is waited for, or asked for the second time."""

    def __init__(self, copy: Callable[[], object]) -> None:
        self._copy: Callable[[], object] | None = copy
        self._asked = False

    def query(self) -> bool:
        if self._asked:
            self.synchronize()
        self._asked = True
        return self._copy is None

    def synchronize(self) -> None:
        if self._copy is not None:
            self._copy()
            self._copy = None


class Device(StackingSink):
    """A sink with copies still under way when it returns, and the staging that goes with it."""

    ahead_bytes = 10_000

    def allocate(self, num_bytes: int) -> Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def prepare(self, piece: Piece, tensor: Tensor, scale: Tensor | None = None) -> None:
        self._started = partial(super().prepare, piece, tensor, scale)

    def record(self) -> Event:
        return Event(self._started)


def test_copies_that_are_done_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from pinned memory to a GPU: a tensor's memory is left alone until its event has fired, and all events have
    when the load ends.
    """
    config = write_tiny_mixtral(tmp_path, shards=3)
    late, at_once = Device(config), StackingSink(config)
    monkeypatch.setattr(loader, "staging_for", {torch.device("cuda", 1): late}.get)
    load(open_checkpoint(tmp_path), late, device=torch.device("cuda", 1))
    load(open_checkpoint(tmp_path), at_once)
    assert late.sources == at_once.sources
    for name, param in at_once.params.items():
        assert torch.equal(late.params[name], param), name
