"""Paged attention in Triton's interpreter against the reference: small tiles, so that a few positions fill several."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.backends.base import AttentionShape, KVCache
from engine.backends.cuda import attention as cuda_attention
from engine.backends.cuda.attention import AttentionTile, AttentionTiles, attention, attention_launches, num_segments
from engine.backends.reference import ReferenceBackend
from engine.batch import Batch, build
from engine.scheduler import Chunk, StepPlan
from tests.engine.routing.inputs import plain_table
from tests.engine.sequences import make_sequence

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
LAYER = 1

# heads, kv heads, head_dim, window
SHAPES = {
    "gqa4": (8, 2, 16, None),
    "group_of_three": (6, 2, 10, None),
    "no_groups": (3, 3, 6, None),
    "group_of_18": (18, 1, 24, None),
    "group_of_17": (17, 1, 2, 9),
    "head_of_80": (4, 2, 80, None),
    "head_of_128": (2, 1, 128, 21),
    "window7": (4, 2, 16, 7),
    "window_of_one": (3, 3, 4, 1),
    "window_of_one_tile": (4, 1, 8, 16),
    "window_beyond_everything": (4, 2, 8, 1000),
}
# (tokens in the cache already, tokens of this step) of every sequence
BATCHES = {
    "first_token": [(0, 1)],
    "one_prompt": [(0, 21)],
    "full_blocks": [(16, 16), (31, 1), (48, 1)],
    "mixed": [(13, 1), (0, 5), (40, 7), (0, 1), (4, 2), (75, 1)],
    "ragged_decodes": [(1, 1), (90, 1), (0, 1), (15, 1), (16, 1), (63, 1), (3, 1)],
}
TILES = AttentionTiles(AttentionTile(16, 16, 4, 1, 1), AttentionTile(16, 16, 4, 1, 1), num_sms=1)
CUT = replace(TILES, num_sms=10_000)
"""So many multiprocessors that contexts are cut as far as _MIN_SEGMENT and _MAX_SEGMENTS let them."""

both_ways = pytest.mark.parametrize("tiles", [TILES, CUT], ids=["whole", "segments"])


def make_shape(name: str) -> AttentionShape:
    num_heads, num_kv_heads, head_dim, window = SHAPES[name]
    return AttentionShape(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=window)


@dataclass(frozen=True)
class Case:
    """A call of attention. All that its sequences do not own in the cache is NaN."""

    batch: Batch
    shape: AttentionShape
    query: Tensor
    cache: KVCache

    def run(self, tiles: AttentionTiles, *, k_scale: float = 1.0, v_scale: float = 1.0) -> Tensor:
        output = torch.full((self.batch.num_tokens, self.query[0].numel()), torch.nan, dtype=self.query.dtype)
        keys, values = self.cache.keys[LAYER], self.cache.values[LAYER]
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        for launch in attention_launches(self.query, keys, values, self.batch, self.shape, tiles, output, **scales):
            for name in ("partial_output", "partial_max", "partial_sum"):
                partial = launch.args[name]
                if isinstance(partial, Tensor) and "NUM_KV_HEADS" in launch.constexprs:
                    partial.fill_(torch.nan)
            launch.run()
        return output

    def expected(self) -> Tensor:
        backend = ReferenceBackend([], device=CPU, dtype=self.query.dtype)
        return backend.attention(self.query, self.cache, LAYER, self.batch, self.shape)


def make_batch(sizes: list[tuple[int, int]], block_size: int, generator: torch.Generator) -> tuple[Batch, int]:
    """Block tables are scrambled; two of the blocks belong to nobody."""
    num_blocks = sum(-(-(start + length) // block_size) for start, length in sizes) + 2
    free = torch.randperm(num_blocks, generator=generator).tolist()
    chunks = []
    for start, length in sizes:
        sequence = make_sequence(list(range(start + length)))
        sequence.block_table = [free.pop() for _ in range(-(-(start + length) // block_size))]
        chunks.append(Chunk(sequence, start, length))
    plan = StepPlan(tuple(chunks))
    return build(plan, block_size=block_size, steering=plain_table(), device=CPU), num_blocks


def make_case(
    sizes: list[tuple[int, int]],
    shape: AttentionShape,
    dtype: torch.dtype = torch.float32,
    *,
    block_size: int = 16,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    batch, num_blocks = make_batch(sizes, block_size, generator)
    cache = KVCache.zeros(LAYER + 2, num_blocks, block_size, shape, dtype=dtype, device=CPU)
    tables = zip(batch.block_tables.tolist(), batch.context_lens, strict=True)
    slots = [table[place // block_size] * block_size + place % block_size for table, n in tables for place in range(n)]
    for tensor in (cache.keys, cache.values):
        own = torch.randn(len(slots), shape.num_kv_heads, shape.head_dim, generator=generator).to(dtype)
        tensor.fill_(torch.nan)
        tensor[LAYER].flatten(0, 1)[slots] = own
    query = 2 * torch.randn(batch.num_tokens, shape.num_heads, shape.head_dim, generator=generator)
    return Case(batch, shape, query.to(dtype), cache)


def check(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_attention, "_MIN_SEGMENT", 4)
    monkeypatch.setattr(cuda_attention, "_MAX_SEGMENTS", 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_reference(shape: str) -> None:
    case = make_case(BATCHES["mixed"], make_shape(shape))
    check(case.run(TILES), case.expected())


@both_ways
@pytest.mark.parametrize("sizes", [name for name in BATCHES if name != "mixed"])
@pytest.mark.usefixtures("short_segments")
def test_equals_the_reference_in_every_batch(sizes: str, tiles: AttentionTiles) -> None:
    for shape in ("gqa4", "window7"):
        case = make_case(BATCHES[sizes], make_shape(shape))
        check(case.run(tiles), case.expected())


@both_ways
@pytest.mark.parametrize("shape", ["window7", "group_of_17", "head_of_80"])
@pytest.mark.usefixtures("short_segments")
def test_equals_the_reference_in_half_precision(shape: str, tiles: AttentionTiles) -> None:
    case = make_case(BATCHES["mixed"], make_shape(shape), torch.float16)
    check(case.run(tiles), case.expected())


@pytest.mark.parametrize(("shape", "max_segments"), [("window7", 2), *((shape, 16) for shape in SHAPES)])
@pytest.mark.usefixtures("short_segments")
def test_segments_equal_the_reference(shape: str, max_segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some segments have no tile: sequences are shorter than the longest, which decides on their number."""
    monkeypatch.setattr(cuda_attention, "_MAX_SEGMENTS", max_segments)
    case = make_case([(5, 1), (20, 3), (70, 1)], make_shape(shape))
    check(case.run(CUT), case.expected())


@both_ways
@pytest.mark.parametrize("block_size", [8, 32, 256])
@pytest.mark.usefixtures("short_segments")
def test_pages_of_other_sizes(block_size: int, tiles: AttentionTiles) -> None:
    case = make_case(BATCHES["mixed"], make_shape("window7"), block_size=block_size)
    check(case.run(tiles), case.expected())


@pytest.mark.parametrize("block_n", [16, 64])
@pytest.mark.parametrize("block_m", [16, 64])
def test_tiles_of_other_sizes(block_m: int, block_n: int) -> None:
    tile = AttentionTile(block_m, block_n, 4, 1, 1)
    for name in ("group_of_three", "window7"):
        case = make_case(BATCHES["mixed"], make_shape(name))
        check(case.run(AttentionTiles(tile, tile, num_sms=1)), case.expected())


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 50), st.one_of(st.just(1), st.integers(1, 9))), min_size=1, max_size=5),
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([1, 2, 8]),
    st.sampled_from([8, 16]),
)
def test_random_batches(sizes: list[tuple[int, int]], shape: str, segments: int, block_size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_attention, "_MIN_SEGMENT", 1)
        patch.setattr(cuda_attention, "_MAX_SEGMENTS", segments)
        case = make_case(sizes, make_shape(shape), block_size=block_size, seed=segments)
        check(case.run(CUT), case.expected())


@both_ways
@pytest.mark.usefixtures("short_segments")
def test_scores_far_apart(tiles: AttentionTiles) -> None:
    """One position takes all the weight, in any tile: earlier sums decay to nothing, later ones add nothing."""
    case = make_case(BATCHES["mixed"], make_shape("gqa4"))
    case = replace(case, query=case.query * 30)
    torch.testing.assert_close(case.run(tiles), case.expected(), rtol=1e-3, atol=1e-3)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("short_segments")
def test_fp8_cache(dtype: torch.dtype, tiles: AttentionTiles) -> None:
    """The reference reads what the bytes stand for, times their scale."""
    k_scale, v_scale = 0.5, 0.25
    case = make_case(BATCHES["mixed"], make_shape("gqa4"), dtype)
    stored = [tensor.to(torch.float8_e4m3fn) for tensor in (case.cache.keys, case.cache.values)]
    scaled = [tensor.to(dtype) * scale for tensor, scale in zip(stored, (k_scale, v_scale), strict=True)]
    actual = replace(case, cache=KVCache(*stored)).run(tiles, k_scale=k_scale, v_scale=v_scale)
    check(actual, replace(case, cache=KVCache(*scaled)).expected())


@both_ways
@pytest.mark.parametrize("sizes", ["mixed", "ragged_decodes"])
@pytest.mark.usefixtures("short_segments")
def test_padding_is_left_alone(sizes: str, tiles: AttentionTiles) -> None:
    """As in a captured graph: three rows and two sequences more than there are, lists that say what may come."""
    case = make_case(BATCHES[sizes], make_shape("gqa4"))
    batch, num_tokens = case.batch, case.batch.num_tokens

    def padded(tensor: Tensor, size: int, value: int) -> Tensor:
        return torch.cat([tensor, tensor.new_full((size, *tensor.shape[1:]), value)])

    wide = replace(
        batch,
        input_ids=padded(batch.input_ids, 3, 0),
        cu_seqlens=padded(batch.cu_seqlens, 2, num_tokens),
        seq_lens=padded(batch.seq_lens, 2, 0),
        block_tables=padded(batch.block_tables, 2, 0),
        query_lens=[*batch.query_lens, 1, 1],
        context_lens=[1000] * (len(batch.query_lens) + 2),
    )
    query = padded(case.query, 3, 1)
    actual = replace(case, batch=wide, query=query).run(tiles)
    check(actual[:num_tokens], case.expected())
    assert actual[num_tokens:].isnan().all()


@both_ways
@pytest.mark.usefixtures("short_segments")
def test_query_inside_a_larger_tensor(tiles: AttentionTiles) -> None:
    case = make_case(BATCHES["mixed"], make_shape("gqa4"))
    heads = torch.full((case.batch.num_tokens, 12, 16), torch.nan)
    heads[:, :8] = case.query
    actual = attention(heads[:, :8], case.cache.keys[LAYER], case.cache.values[LAYER], case.batch, case.shape, tiles)
    check(actual, case.expected())


def test_a_cache_of_more_elements_than_an_int32_counts() -> None:
    """Its pages are zeros that were never touched, but for those of one sequence, the last."""
    shape = AttentionShape(num_heads=4, num_kv_heads=2, head_dim=128, sliding_window=None)
    case = make_case([(40, 1), (20, 3)], shape)
    num_blocks = 2**31 // (16 * 2 * 128) + case.cache.num_blocks
    first = num_blocks - case.cache.num_blocks
    cache = KVCache.zeros(1, num_blocks, 16, shape, dtype=torch.float8_e4m3fn, device=CPU)
    small = [tensor[LAYER].to(torch.float8_e4m3fn) for tensor in (case.cache.keys, case.cache.values)]
    for large, own in zip((cache.keys, cache.values), small, strict=True):
        large[0, first:] = own
    moved = replace(case.batch, block_tables=case.batch.block_tables + first)
    actual = attention(case.query, cache.keys[0], cache.values[0], moved, shape, TILES)
    exact = KVCache(*(tensor.float().expand(LAYER + 1, *tensor.shape) for tensor in small))
    check(actual, replace(case, cache=exact).expected())


@both_ways
@pytest.mark.usefixtures("short_segments")
def test_a_sequence_has_the_same_bits_alone_and_in_a_batch(tiles: AttentionTiles) -> None:
    case = make_case([(40, 1), (9, 1), (30, 6), (52, 1), (44, 5)], make_shape("gqa4"))
    together, batch = case.run(tiles), case.batch
    starts = batch.cu_seqlens.tolist()
    for row, (length, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        tokens = slice(starts[row], starts[row + 1])
        alone = replace(
            batch,
            input_ids=batch.input_ids[tokens],
            cu_seqlens=torch.tensor([0, length], dtype=torch.int32),
            seq_lens=batch.seq_lens[row : row + 1],
            block_tables=batch.block_tables[row : row + 1],
            query_lens=[length],
            context_lens=[max(context, 16)],
        )
        assert torch.equal(replace(case, batch=alone, query=case.query[tokens]).run(tiles), together[tokens])


@both_ways
@pytest.mark.usefixtures("short_segments")
def test_decodes_and_chunks_are_computed_once(tiles: AttentionTiles) -> None:
    case = make_case(BATCHES["mixed"], make_shape("window7"))
    keys, values = case.cache.keys[LAYER], case.cache.values[LAYER]
    lengths = torch.tensor(case.batch.query_lens)
    is_decode = (lengths == 1).repeat_interleave(lengths)
    for decode in (True, False):
        output = torch.full((case.batch.num_tokens, 64), torch.nan)
        for launch in attention_launches(case.query, keys, values, case.batch, case.shape, tiles, output):
            if launch.constexprs["DECODE"] == decode:
                launch.run()
        assert torch.equal(output.isfinite().all(1), is_decode == decode)


def test_the_launches_are_those_that_have_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def grids(
        sizes: list[tuple[int, int]], tiles: AttentionTiles, *, shape: str = "gqa4"
    ) -> list[tuple[str, tuple[int, ...]]]:
        case = make_case(sizes, make_shape(shape))
        cache = case.cache.keys[LAYER], case.cache.values[LAYER]
        launches = attention_launches(case.query, *cache, case.batch, case.shape, tiles, case.query.flatten(1))
        return [("decode" if launch.constexprs["DECODE"] else "chunks", launch.grid) for launch in launches]

    assert grids([(9, 1), (3, 1)], TILES) == [("decode", (2, 2, 1))]
    assert grids([(9, 7)], TILES) == [("chunks", (7 // 4 + 1, 2, 1))]
    assert grids([(9, 7), (4, 1)], TILES) == [("decode", (2, 2, 1)), ("chunks", (8 // 4 + 2, 2, 1))]
    monkeypatch.setattr(cuda_attention, "_MIN_SEGMENT", 7)
    # The decode's 5 positions are worth one segment, the chunk's 16 worth two.
    reduced = [("decode", (2, 2, 1)), ("chunks", (4, 2, 2)), ("chunks", (4, 8, 4))]
    assert grids([(9, 7), (4, 1)], CUT) == reduced
    # Of 100 positions a decode sees the 7 of its window, and 8 queries together see 14.
    assert grids([(99, 1)], CUT, shape="window7") == [("decode", (1, 2, 1))]
    assert grids([(92, 8)], CUT, shape="window7")[0] == ("chunks", (2, 2, 2))


def test_contexts_are_cut_until_the_card_is_full() -> None:
    wanted = 4 * 132
    assert num_segments(64 * 8, 4096, wanted) == 2
    assert num_segments(256 * 8, 4096, wanted) == 1
    assert num_segments(8, 5000, wanted) == 16
    assert num_segments(8, 511, wanted) == 1
    assert num_segments(8, 512, wanted) == 2
    assert num_segments(8, 1, wanted) == 1
    assert num_segments(1, 1_000_000, wanted) == 64
