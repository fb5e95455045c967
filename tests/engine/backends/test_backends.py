"""Every operation of the torch backend against the reference, over odd sizes; the reference against other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import apply_rotary_pos_emb

from engine.backends.base import LayerBackend
from engine.backends.reference import ReferenceBackend
from engine.backends.store import ParamStore
from engine.backends.torch import TorchBackend
from engine.layers.rotary import inverse_frequencies
from engine.routing.base import Routing
from engine.routing.plan import group
from weights.params import ParamKind, ParamSpec, Piece

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CLASSES: list[Any] = [TorchBackend, ReferenceBackend]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_backends(params: dict[str, Tensor], dtype: torch.dtype) -> tuple[TorchBackend, ReferenceBackend]:
    """Both backends with the same parameters, each given in one piece (experts: one piece each)."""
    specs = [ParamSpec(name, tuple(tensor.shape), ParamKind.ATTENTION) for name, tensor in params.items()]
    backends = TorchBackend(specs, device=CPU, dtype=dtype), ReferenceBackend(specs, device=CPU, dtype=dtype)
    for backend in backends:
        for name, tensor in params.items():
            if tensor.dim() < 3:
                backend.prepare(Piece(name, tuple(tensor.shape), name), tensor)
                continue
            for expert, own in enumerate(tensor):
                backend.prepare(Piece(name, tuple(own.shape), name, expert=expert), own)
    return backends


def check(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_in", "num_out"), [(1, 1, 1), (7, 5, 3), (13, 33, 17), (3, 1, 29)])
def test_linear_and_logits(num_tokens: int, num_in: int, num_out: int, dtype: torch.dtype) -> None:
    fast, slow = make_backends({"w": normal(num_out, num_in, seed=1)}, dtype)
    x = normal(num_tokens, num_in, dtype=dtype)
    check(fast.linear("w", x), slow.linear("w", x), dtype)
    assert fast.linear("w", x).dtype == dtype
    logits = slow.logits("w", x)
    assert logits.dtype == fast.logits("w", x).dtype == torch.float32
    scale = logits.abs().max().clamp(min=1)
    check(fast.logits("w", x) / scale, logits / scale, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embed(dtype: torch.dtype) -> None:
    table = normal(11, 5, dtype=dtype)
    input_ids = torch.tensor([10, 0, 3, 3, 10])
    for backend in make_backends({"table": table}, dtype):
        assert torch.equal(backend.embed("table", input_ids), table[input_ids])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_rms_norm(scale: float, dtype: torch.dtype) -> None:
    weight = normal(19, seed=2)
    fast, slow = make_backends({"norm": weight}, dtype)
    x = (normal(6, 19) * scale).to(dtype)
    expected = slow.rms_norm("norm", x, 1e-5)
    check(fast.rms_norm("norm", x, 1e-5), expected, dtype)
    check(F.rms_norm(x.float(), (19,), weight.to(dtype).float(), eps=1e-5).to(dtype), expected, dtype)
    assert not fast.rms_norm("norm", torch.zeros_like(x), 1e-5).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (3, 6), (5, 16)])
def test_rotary(num_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 2, 77, 4095, 32767, 5])
    x = normal(len(positions), num_heads, head_dim, dtype=dtype)
    inv_freq = inverse_frequencies(head_dim, 1e4, CPU)
    fast, slow = make_backends({}, dtype)
    expected = slow.rotary(x, positions, inv_freq)
    check(fast.rotary(x, positions, inv_freq), expected, dtype)
    assert torch.equal(expected[0], x[0]), "position 0 is not turned"
    # transformers: cos and sin [B, T, N] of angles that are repeated for the two halves
    angles = torch.cat([positions[:, None] * inv_freq] * 2, dim=-1)[None]
    wide = x.float()[None]
    turned, _ = apply_rotary_pos_emb(wide, wide, angles.cos(), angles.sin(), unsqueeze_dim=2)
    check(turned[0].to(dtype), expected, dtype)


def test_rotary_takes_slices_of_a_larger_tensor() -> None:
    heads, positions, inv_freq = normal(4, 7, 6), torch.arange(4), inverse_frequencies(6, 1e4, CPU)
    for backend in make_backends({}, torch.float32):
        keys = heads[:, 3:5]
        assert torch.equal(
            backend.rotary(keys, positions, inv_freq), backend.rotary(keys.contiguous(), positions, inv_freq)
        )


def test_inverse_frequencies() -> None:
    expected = [1.0, 10000.0 ** (-2 / 6), 10000.0 ** (-4 / 6)]
    assert inverse_frequencies(6, 10000.0, CPU).tolist() == pytest.approx(expected, rel=1e-6)


def make_routing(num_tokens: int, top_k: int, num_experts: int, *, unused: float = 0.0, seed: int = 0) -> Routing:
    """Distinct experts for each token and weights that sum to anything; a share of the places is -1 with weight 0."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    expert_ids = logits.argsort(-1)[:, :top_k].int()
    weights = torch.rand(num_tokens, top_k, generator=generator)
    dropped = torch.rand(num_tokens, top_k, generator=generator) < unused
    return Routing(expert_ids.masked_fill(dropped, -1), weights.masked_fill(dropped, 0.0), logits, expert_ids)


def run_experts(backends: Sequence[LayerBackend], x: Tensor, routing: Routing, num_experts: int) -> list[Tensor]:
    return [backend.experts("w13", "w2", x, routing, group(routing.expert_ids, num_experts)) for backend in backends]


def make_experts(sizes: tuple[int, int, int], dtype: torch.dtype) -> tuple[TorchBackend, ReferenceBackend]:
    num_experts, hidden_size, ffn_size = sizes
    w13 = normal(num_experts, 2 * ffn_size, hidden_size, seed=3) / hidden_size**0.5
    return make_backends({"w13": w13, "w2": normal(num_experts, hidden_size, ffn_size, seed=4) / ffn_size**0.5}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unused", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "hidden_size", "ffn_size"),
    [(13, 2, 5, 7, 11), (1, 1, 1, 1, 1), (1, 3, 9, 5, 3), (29, 4, 4, 6, 17), (3, 1, 16, 33, 2)],
)
def test_experts(
    num_tokens: int, top_k: int, num_experts: int, hidden_size: int, ffn_size: int, unused: float, dtype: torch.dtype
) -> None:
    backends = make_experts((num_experts, hidden_size, ffn_size), dtype)
    routing = make_routing(num_tokens, top_k, num_experts, unused=unused)
    x = normal(num_tokens, hidden_size, dtype=dtype)
    actual, expected = run_experts(backends, x, routing, num_experts)
    assert actual.shape == x.shape
    check(actual, expected, dtype)
    if unused == 1.0:
        assert not actual.any()


def test_the_reference_experts_are_the_definition() -> None:
    fast, slow = make_experts((3, 5, 4), torch.float32)
    x, routing = normal(4, 5), make_routing(4, 2, 3, unused=0.3, seed=1)
    w13, w2 = normal(3, 8, 5, seed=3) / 5**0.5, normal(3, 5, 4, seed=4) / 4**0.5
    expected = torch.zeros(4, 5)
    for token in range(4):
        for place in range(2):
            expert = int(routing.expert_ids[token, place])
            if expert >= 0:
                gate, up = w13[expert, :4] @ x[token], w13[expert, 4:] @ x[token]
                expected[token] += routing.weights[token, place] * (w2[expert] @ (gate * torch.sigmoid(gate) * up))
    for actual in run_experts([fast, slow], x, routing, 3):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("expert", [0, 4])
def test_all_tokens_to_one_expert(expert: int) -> None:
    backends = make_experts((5, 7, 3), torch.float32)
    expert_ids = torch.full((17, 2), -1, dtype=torch.int32)
    expert_ids[:, 1] = expert
    routing = Routing(expert_ids, torch.full((17, 2), 0.75), torch.zeros(17, 5), expert_ids)
    actual, expected = run_experts(backends, normal(17, 7), routing, 5)
    check(actual, expected, torch.float32)


@pytest.mark.parametrize("unused", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("hidden_size", "ffn_size"), [(16, 24), (8, 8), (7, 16), (16, 11)])
def test_the_grouped_gemm_of_newer_gpus(hidden_size: int, ffn_size: int, unused: float) -> None:
    """torch has the operation on the CPU too, with the same demands on its arguments."""
    backends = make_experts((5, hidden_size, ffn_size), torch.bfloat16)
    backends[0]._grouped_mm = True
    routing = make_routing(13, 2, 5, unused=unused)
    actual, expected = run_experts(backends, normal(13, hidden_size, dtype=torch.bfloat16), routing, 5)
    check(actual, expected, torch.bfloat16)


@pytest.mark.parametrize("make", CLASSES)
def test_a_parameter_is_put_together_from_pieces(make: Any) -> None:
    """The example of weights/params.py: expert 2's w3 fills w13[2, 3:6]."""
    specs = [ParamSpec("qkv", (5, 4), ParamKind.ATTENTION), ParamSpec("w13", (3, 6, 4), ParamKind.EXPERT)]
    backend: LayerBackend = make(specs, device=CPU, dtype=torch.float32)
    assert not backend.has("qkv")
    whole = normal(5, 4)
    for row, size in ((3, 2), (0, 3)):
        backend.prepare(Piece("x", (size, 4), "qkv", row=row), whole[row : row + size].half())
    assert backend.has("qkv")
    torch.testing.assert_close(backend.linear("qkv", torch.eye(4)), whole.half().float().T)
    source = normal(3, 4)
    store = ParamStore(specs, device=CPU, dtype=torch.bfloat16)
    for expert in range(3):
        for row in (0, 3):
            store.put(Piece("y", (3, 4), "w13", expert=expert, row=row), torch.full((3, 4), float(expert * 10 + row)))
    store.put(Piece("y", (3, 4), "w13", expert=2, row=3), source)
    assert torch.equal(store["w13"][2, 3:6], source.bfloat16())
    assert [store["w13"][expert, row, 0].item() for expert in range(3) for row in (0, 3)][:5] == [0, 3, 10, 13, 20]
    source.zero_()
    assert store["w13"][2, 3:6].any(), "the tensor is copied"
