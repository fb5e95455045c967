"""Norms, rotary positions and the write into the cache, against the torch and reference backends."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.backends.base import AttentionShape, KVCache, LayerBackend
from engine.backends.cuda.rows import add_rms_norm_launch, rms_norm_launch, rotary_angles, rotary_write_launch
from engine.backends.reference import ReferenceBackend
from engine.backends.torch import TorchBackend
from engine.layers.rotary import inverse_frequencies
from weights.params import ParamKind, ParamSpec, Piece

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
EPS = 1e-5
DTYPES = [torch.float32, torch.float16]
# Float32 sums are added in another order; half precision then rounds to a neighbour, twice in the reference's way.
AGAINST_TORCH = {torch.float32: 2e-6, torch.float16: 1e-3}
AGAINST_REFERENCE = {torch.float32: 2e-6, torch.float16: 2e-3}
BLOCK_SIZE = 4

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def normal(*shape: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan")).to(dtype)


def check_norm(normed: Tensor, x: Tensor, weight: Tensor, rows: Tensor | None = None) -> None:
    """`normed` is what both backends make of x."""
    specs = [ParamSpec("norm", tuple(weight.shape), ParamKind.NORM)]
    backends: list[tuple[LayerBackend, float]] = [
        (TorchBackend(specs, device=CPU, dtype=x.dtype), AGAINST_TORCH[x.dtype]),
        (ReferenceBackend(specs, device=CPU, dtype=x.dtype), AGAINST_REFERENCE[x.dtype]),
    ]
    for backend, tolerance in backends:
        backend.prepare(Piece("norm", tuple(weight.shape), "norm"), weight)
        expected = backend.rms_norm("norm", x, EPS, rows)
        torch.testing.assert_close(normed, expected, rtol=tolerance, atol=1e-7)
        if x.dtype == torch.float16 and isinstance(backend, TorchBackend):  # rounded where torch rounds
            assert (normed == expected).float().mean().nan_to_num(1) > 0.99


@dtypes
@pytest.mark.parametrize("scale", [1e-3, 1.0, 60.0])
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 1), (1, 64), (5, 33), (13, 1030), (3, 4096)])
def test_rms_norm(num_tokens: int, hidden_size: int, scale: float, dtype: torch.dtype) -> None:
    x = normal(num_tokens, hidden_size, dtype=dtype, seed=1, scale=scale)
    weight, before = normal(hidden_size, dtype=dtype, seed=2), x.clone()
    normed = poisoned(num_tokens, hidden_size, dtype=dtype)
    rms_norm_launch(x, weight, EPS, normed).run()
    check_norm(normed, x, weight)
    assert torch.equal(x, before)


@dtypes
@pytest.mark.parametrize(("num_tokens", "hidden_size"), [(1, 1), (2, 64), (7, 33), (9, 1030)])
def test_add_rms_norm(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    x, y = (normal(num_tokens, hidden_size, dtype=dtype, seed=seed, scale=3) for seed in (1, 2))
    weight, total = normal(hidden_size, dtype=dtype, seed=3), x + y
    normed = poisoned(num_tokens, hidden_size, dtype=dtype)
    add_rms_norm_launch(x, y, weight, EPS, normed).run()
    assert torch.equal(x, total)
    check_norm(normed, total, weight)


@dtypes
@pytest.mark.parametrize("rows", [[], [0], [4, 0, 4, 6]])
def test_rms_norm_of_some_rows(rows: list[int], dtype: torch.dtype) -> None:
    x, weight, index = normal(7, 33, dtype=dtype, seed=1), normal(33, dtype=dtype, seed=2), torch.tensor(rows).long()
    normed = poisoned(len(rows), 33, dtype=dtype)
    rms_norm_launch(x, weight, EPS, normed, rows=index).run()
    check_norm(normed, x, weight, index)


def test_rows_share_nothing() -> None:
    """A row that is not finite leaves the others as they are."""
    x, weight = normal(3, 33, dtype=torch.float32, seed=1), normal(33, dtype=torch.float32, seed=2)
    alone, normed = poisoned(3, 33, dtype=x.dtype), poisoned(3, 33, dtype=x.dtype)
    rms_norm_launch(x, weight, EPS, alone).run()
    x[1, 5] = float("nan")
    rms_norm_launch(x, weight, EPS, normed).run()
    assert torch.equal(normed[[0, 2]], alone[[0, 2]])
    assert normed[1].isnan().all()


class Case:
    """Tokens at scattered positions and slots, the third a row of padding, and a poisoned cache."""

    def __init__(
        self, sizes: tuple[int, int, int], num_tokens: int, dtype: torch.dtype, cache_dtype: torch.dtype
    ) -> None:
        num_heads, num_kv_heads, head_dim = sizes
        self.shape = AttentionShape(
            num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=None
        )
        self.qkv = normal(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype, seed=3)
        generator = torch.Generator().manual_seed(num_tokens)
        self.positions = torch.randint(40_000, (num_tokens,), generator=generator)
        self.slot_mapping = torch.randperm((num_tokens + 1) * BLOCK_SIZE, generator=generator)[:num_tokens]
        self.slot_mapping[2:3] = -1
        self.inv_freq = inverse_frequencies(head_dim, 1e6, CPU)
        size = (num_tokens + 1, BLOCK_SIZE, num_kv_heads, head_dim)
        self.keys, self.values = poisoned(*size, dtype=cache_dtype), poisoned(*size, dtype=cache_dtype)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of query, keys and values [T, heads, N]."""
        heads = self.qkv.clone().view(self.qkv.shape[0], -1, self.shape.head_dim)
        num_heads, num_kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        return heads[:, :num_heads], heads[:, num_heads:-num_kv_heads], heads[:, -num_kv_heads:]

    def run(self, *, k_scale: float = 1.0, v_scale: float = 1.0) -> None:
        angles = rotary_angles(self.positions, self.inv_freq)
        rotary_write_launch(
            self.qkv,
            *angles,
            self.slot_mapping,
            self.keys,
            self.values,
            self.shape,
            k_scale=k_scale,
            v_scale=v_scale,
        ).run()

    def rotated(self, heads: Tensor) -> Tensor:
        return TorchBackend([], device=CPU, dtype=heads.dtype).rotary(heads, self.positions, self.inv_freq)

    def expected_cache(self, keys: Tensor, values: Tensor) -> KVCache:
        """Poisoned, with keys and values [T, G, N] where the torch backend writes those that have a slot."""
        used, size = self.slot_mapping >= 0, (1, *self.keys.shape)
        cache = KVCache(poisoned(*size, dtype=keys.dtype), poisoned(*size, dtype=keys.dtype))
        backend = TorchBackend([], device=CPU, dtype=keys.dtype)
        backend.write_kv(cache, 0, keys[used], values[used], self.slot_mapping[used])
        return cache


def same(actual: Tensor, expected: Tensor) -> None:
    """Equal, and NaN in the same places."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@dtypes
@pytest.mark.parametrize("num_tokens", [1, 7])
@pytest.mark.parametrize("sizes", [(1, 1, 2), (4, 2, 8), (3, 1, 6), (5, 5, 10), (36, 2, 16), (32, 8, 128)], ids=str)
def test_rotary_write(sizes: tuple[int, int, int], num_tokens: int, dtype: torch.dtype) -> None:
    case = Case(sizes, num_tokens, dtype, dtype)
    query, keys, values = case.heads()
    case.run()
    rotated, own_keys, own_values = case.heads()
    same(rotated, case.rotated(query))
    same(rotated, ReferenceBackend([], device=CPU, dtype=dtype).rotary(query, case.positions, case.inv_freq))
    same(own_keys, keys)
    same(own_values, values)
    expected = case.expected_cache(case.rotated(keys), values)
    same(case.keys, expected.keys[0])
    same(case.values, expected.values[0])


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")  # of numpy, which is the interpreter
@dtypes
def test_what_is_not_finite_is_written_as_zero(dtype: torch.dtype) -> None:
    case = Case((2, 1, 6), 7, dtype, dtype)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")])
    heads = case.qkv.view(7, 4, 6)  # two of the query, key, value
    heads[0, 3, :3] = bad
    heads[1, 2, 1:4] = bad
    heads[3, 2] = torch.finfo(dtype).max  # finite, and not when rotated
    case.positions[3] = 1
    _, keys, values = case.heads()
    case.run()
    assert not case.rotated(keys)[3].isfinite().all()
    expected = case.expected_cache(case.rotated(keys), values)
    same(case.keys, expected.keys[0])
    same(case.values, expected.values[0])


@dtypes
def test_an_8_bit_cache(dtype: torch.dtype) -> None:
    """With numbers that 8 bits hold exactly: the interpreter's rounding to e4m3 is wrong."""
    case = Case((4, 2, 10), 7, dtype, torch.float8_e4m3fn)
    case.positions.zero_()  # nothing turns
    case.qkv = case.qkv.float().to(torch.float8_e4m3fn).to(dtype)
    case.qkv[0] *= 2048  # beyond the largest, 448
    case.qkv[1, -1] = float("inf")
    _, keys, values = case.heads()
    case.run(k_scale=0.5, v_scale=0.25)
    expected = case.expected_cache(keys, values)
    for actual, wide, scale in ((case.keys, expected.keys[0], 0.5), (case.values, expected.values[0], 0.25)):
        same(actual.float(), (wide.float() / scale).clamp(-448, 448))
        assert (actual.float().abs() == 448).any()
