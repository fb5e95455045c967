"""The CPU's kernels against the reference, layer by layer, for every instruction set that this machine has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.backends.base import KVCache
from engine.backends.cpu import CpuBackend
from engine.backends.reference import ReferenceBackend
from engine.batch import Batch, build
from engine.kernels.cpu.library import InstructionSet, WeightType, available
from engine.models.decoder import Decoder
from engine.models.registry import build_model
from engine.routing.base import GateOutput
from engine.routing.select import make_router
from engine.routing.steering import SteeringTable
from engine.routing.topk_softmax import TopKSoftmax
from engine.scheduler import Chunk, StepPlan
from engine.types import Steering
from tests.engine.sequences import make_sequence
from tests.tiny import TINY_MIXTRAL, tiny_tensors
from weights.config import ModelConfig
from weights.families import family_of
from weights.families.mixtral import param_specs
from weights.params import ParamKind

CPU = torch.device("cpu")
BLOCK_SIZE = 4
BUILT = available()

# Sizes that are no multiple of a tile, in every dimension; groups of 1 to 8 heads; windows.
SHAPES: dict[str, ModelConfig] = {
    "tiny": TINY_MIXTRAL,
    "odd": replace(TINY_MIXTRAL, hidden_size=33, intermediate_size=37, num_heads=3, num_kv_heads=1, head_dim=6),
    "wide": replace(TINY_MIXTRAL, hidden_size=144, intermediate_size=200, num_heads=5, num_kv_heads=5, head_dim=64),
    "mqa": replace(TINY_MIXTRAL, num_heads=8, num_kv_heads=1, head_dim=32, num_experts=5, num_experts_per_tok=3),
    "many_heads": replace(TINY_MIXTRAL, num_heads=36, num_kv_heads=2, head_dim=16),
    "window": replace(TINY_MIXTRAL, sliding_window=7, head_dim=16),
    "long_window": replace(TINY_MIXTRAL, sliding_window=90, head_dim=16),
    "one_expert": replace(TINY_MIXTRAL, num_experts=1, num_experts_per_tok=1),
}
# (tokens in the cache already, tokens of this step) of every sequence
BATCHES = {
    "one": [(0, 1)],
    "decode": [(5, 1)],
    "prompt": [(0, 9)],
    "chunk": [(70, 67)],
    "mixed": [(13, 1), (0, 7), (9, 4), (2, 1), (0, 1), (4, 2), (31, 1), (0, 3)],
    "decodes": [(1, 1), (160, 1), (0, 1), (15, 1), (16, 1), (33, 1), (63, 1), (64, 1), (7, 1)],
    "segments": [(900, 1)],
    "segments_and_prompt": [(700, 1), (0, 5), (3, 1)],
}
CASES = [
    *((shape, batch) for shape in ("tiny", "odd") for batch in BATCHES),
    *((shape, batch) for shape in SHAPES for batch in ("mixed", "chunk")),
    *((shape, batch) for shape in ("window", "long_window", "many_heads") for batch in ("decodes", "segments")),
]


def test_this_machine_has_kernels() -> None:
    """The tests below would pass with none: at least plain C++ was built, wherever there is a compiler."""
    assert BUILT[0] is InstructionSet.scalar


@pytest.mark.parametrize("isa", BUILT, ids=lambda isa: isa.name)
@pytest.mark.parametrize(("shape", "batch"), list(dict.fromkeys(CASES)))
def test_float32_equals_the_reference(isa: InstructionSet, shape: str, batch: str) -> None:
    fast, slow = run(SHAPES[shape], BATCHES[batch], isa, WeightType.float32)
    check(fast, slow, 2e-5)


@pytest.mark.parametrize("isa", BUILT, ids=lambda isa: isa.name)
@pytest.mark.parametrize(
    # Without a token whose choice of experts is a near tie.
    ("shape", "batch"),
    [("odd", "chunk"), ("wide", "mixed"), ("mqa", "chunk"), ("tiny", "segments")],
)
@pytest.mark.parametrize("weight_type", [WeightType.bfloat16, WeightType.int8], ids=lambda kind: kind.name)
def test_small_weights_are_near_the_reference(
    isa: InstructionSet, shape: str, batch: str, weight_type: WeightType
) -> None:
    """Against float32 arithmetic on the very same rounded weights."""
    fast, slow = run(SHAPES[shape], BATCHES[batch], isa, weight_type)
    for ours, theirs in zip(fast, slow, strict=True):
        assert ours.isfinite().all()
        error = (ours - theirs).square().mean().sqrt() / theirs.square().mean().sqrt()
        assert error < 0.01, f"relative error {error:.2e}"


@pytest.mark.parametrize("isa", BUILT, ids=lambda isa: isa.name)
def test_steered_routing_leaves_places_empty(isa: InstructionSet) -> None:
    steerings = [
        Steering(experts_per_token=1),
        None,
        Steering(experts_per_token=4),
        Steering(forbidden=((None, (0, 2)),)),
    ]
    fast, slow = run(TINY_MIXTRAL, [(0, 5), (3, 1), (9, 2), (0, 7)], isa, WeightType.float32, steerings=steerings)
    check(fast, slow, 2e-5)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 6, 7, 8, 11, 13, 64])
@pytest.mark.parametrize("isa", BUILT, ids=lambda isa: isa.name)
def test_linear_for_any_number_of_rows(isa: InstructionSet, num_tokens: int) -> None:
    config = SHAPES["odd"]
    backend = make_backend(config, isa, WeightType.float32, torch.float32)
    oracle = reference(config, torch.float32)
    x = torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(num_tokens))
    torch.testing.assert_close(backend.logits("lm_head", x), oracle.logits("lm_head", x), rtol=1e-5, atol=1e-5)
    ids = torch.arange(num_tokens) * 7 % config.vocab_size
    assert torch.equal(backend.embed("embed_tokens", ids), oracle.embed("embed_tokens", ids))


def test_int8_scales_are_a_row_each() -> None:
    """The error of a row is at most half a step of its own scale, however large another row is."""
    config = SHAPES["odd"]
    backend = make_backend(config, BUILT[-1], WeightType.int8, torch.float32)
    table = reference(config, torch.float32).embed("embed_tokens", torch.arange(config.vocab_size))
    rounded = backend.embed("embed_tokens", torch.arange(config.vocab_size))
    step = table.abs().amax(dim=-1, keepdim=True) / 127
    assert ((rounded - table).abs() <= 0.5001 * step).all()
    assert (rounded != table).any()


@pytest.mark.parametrize("isa", BUILT, ids=lambda isa: isa.name)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 9])
def test_int8_products_are_finer_than_bfloat16(isa: InstructionSet, num_tokens: int) -> None:
    """Activations are not rounded to 8 bits: also beside numbers a thousand times as large, in rows of any scale."""
    config = SHAPES["odd"]
    backend = make_backend(config, isa, WeightType.int8, torch.float32)
    table = backend.embed("embed_tokens", torch.arange(config.vocab_size))
    x = torch.randn(num_tokens, config.hidden_size, generator=torch.Generator().manual_seed(0))
    x[:, 5] *= 1000
    x *= torch.logspace(-6, 6, num_tokens)[:, None] if num_tokens > 1 else 1
    y = backend.linear("embed_tokens", x)
    exact = x.double() @ table.double().T
    size = x.abs().amax(dim=-1, keepdim=True) * table.abs().sum(dim=-1)
    assert ((y - exact).abs() <= 3e-5 * size).all()
    zeros, endless = torch.zeros(1, config.hidden_size), torch.full((1, config.hidden_size), torch.inf)
    assert (backend.linear("embed_tokens", zeros) == 0).all()
    assert not backend.linear("embed_tokens", endless).isfinite().any()


@pytest.mark.parametrize("weight_type", list(WeightType), ids=lambda kind: kind.name)
def test_packed_weights_have_the_size_of_their_layout(weight_type: WeightType) -> None:
    """Blocks of 16 rows whose sum is padded to what the layout takes at a time: a byte less, and kernels run over."""
    backend = make_backend(SHAPES["odd"], BUILT[-1], weight_type, torch.float32)
    together = {WeightType.float32: 1, WeightType.bfloat16: 2, WeightType.int8: 4}[weight_type]
    for param in backend._packed.values():
        per_block = 16 * -(-param.size // together) * together
        assert param.data.numel() % (per_block * param.num_blocks) == 0


def test_hidden_states_do_not_depend_on_the_batch() -> None:
    """A sequence alone and among others has the same bits: rows never share a sum."""
    config, isa = SHAPES["wide"], BUILT[-1]
    sizes = [(9, 1), (30, 1), (0, 6)]
    together, _ = run(config, sizes, isa, WeightType.bfloat16)
    assert together[0].isfinite().all()
    row = 0
    for index, size in enumerate(sizes):
        alone, _ = run(config, sizes, isa, WeightType.bfloat16, only=index)
        assert torch.equal(alone[0], together[0][row : row + size[1]])
        row += size[1]


def make_backend(config: ModelConfig, isa: InstructionSet, weight_type: WeightType, dtype: torch.dtype) -> CpuBackend:
    backend = CpuBackend(config, dtype=dtype, weight_type=weight_type, instruction_set=isa)
    _fill(backend, config)
    return backend


def reference(config: ModelConfig, dtype: torch.dtype, *, int8: bool = False) -> ReferenceBackend:
    """With the weights that the kernels round to when `int8`."""
    backend = ReferenceBackend(param_specs(config), device=CPU, dtype=dtype)
    _fill(backend, config, int8=int8)
    return backend


def _fill(backend: CpuBackend | ReferenceBackend, config: ModelConfig, *, int8: bool = False) -> None:
    tensors = tiny_tensors(config, seed=3)
    kinds = {spec.name: spec.kind for spec in param_specs(config)}
    for piece in family_of(config).pieces(config):
        tensor = tensors[piece.source]
        if tensor.dim() > 1:
            tensor = tensor.to(torch.bfloat16)
            if int8 and kinds[piece.param] is not ParamKind.ROUTER:
                scale = tensor.float().abs().amax(dim=-1, keepdim=True) / 127
                tensor = (tensor.float() / scale).round() * scale
        backend.prepare(piece, tensor)


def run(
    config: ModelConfig,
    sizes: list[tuple[int, int]],
    isa: InstructionSet,
    weight_type: WeightType,
    *,
    steerings: list[Steering | None] | None = None,
    only: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, keys and values after a step, by the kernels and by the reference. What was in the cache before is
    garbage wherever no sequence has it."""
    dtype = torch.float32 if weight_type is WeightType.float32 else torch.bfloat16
    router = make_router(config, router=None, capacity_factor=None, simulation=None)
    steering = SteeringTable.for_model(config, num_slots=len(sizes) + 1, device=CPU)
    plan, num_blocks = make_plan(sizes, steerings or [None] * len(sizes))
    if only is not None:
        plan = StepPlan((plan.chunks[only],))
    batch = build(plan, block_size=BLOCK_SIZE, steering=steering, device=CPU)
    results = []
    exact = reference(config, torch.float32, int8=weight_type is WeightType.int8)
    for backend in (make_backend(config, isa, weight_type, dtype), exact):
        decoder = build_model(config, backend, router)
        cache = backend.new_kv_cache(config.num_layers, num_blocks, BLOCK_SIZE, decoder.attention_shape)
        fill_cache(cache, config.head_dim, dtype)
        hidden = forward(decoder, batch, cache)
        keys, values = (used(part[..., : config.head_dim], batch) for part in (cache.keys, cache.values))
        results.append((hidden, keys, values))
    return results[0], results[1]


def forward(decoder: Decoder, batch: Batch, cache: KVCache) -> Tensor:
    with torch.inference_mode():
        return decoder.forward(batch, cache).float()


def make_plan(sizes: list[tuple[int, int]], steerings: list[Steering | None]) -> tuple[StepPlan, int]:
    """Chunks over scrambled blocks."""
    num_blocks = sum(-(-(start + length) // BLOCK_SIZE) for start, length in sizes) + 2
    free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
    chunks = []
    for (start, length), steering in zip(sizes, steerings, strict=True):
        ids = [(7 * position + start) % TINY_MIXTRAL.vocab_size for position in range(start + length)]
        sequence = make_sequence(ids, steering=steering)
        sequence.block_table = [free.pop() for _ in range(-(-(start + length) // BLOCK_SIZE))]
        chunks.append(Chunk(sequence, start, length))
    return StepPlan(tuple(chunks)), num_blocks


def fill_cache(cache: KVCache, head_dim: int, dtype: torch.dtype) -> None:
    """Random keys and values, the same for every backend; beyond a head's own numbers there is nothing but zeros."""
    generator = torch.Generator().manual_seed(2)
    for part in (cache.keys, cache.values):
        numbers = torch.randn(*part.shape[:-1], head_dim, generator=generator)
        part[..., :head_dim] = numbers.to(dtype).to(part.dtype)


def used(part: Tensor, batch: Batch) -> Tensor:
    """What this step wrote, all layers."""
    return part.flatten(1, 2)[:, batch.slot_mapping].float()


def check(actual: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor], tolerance: float) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.isfinite().all()
        error = (ours - theirs).abs().max() / theirs.abs().max()
        assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 2), (8, 3), (16, 16)])
def test_route_equals_the_router(num_experts: int, top_k: int, renormalize: bool) -> None:
    """Rows of different K, forbidden experts, min-p, equal logits, and gates so far apart that a softmax underflows."""
    config = replace(TINY_MIXTRAL, num_experts=num_experts, num_experts_per_tok=top_k)
    backend = CpuBackend(config, dtype=torch.float32, weight_type=WeightType.float32, instruction_set=BUILT[-1])
    steerings = [
        None,
        Steering(experts_per_token=1),
        Steering(experts_per_token=num_experts),
        Steering(min_p=0.3, experts_per_token=num_experts),
        Steering(forbidden=((1, tuple(range(0, num_experts - 1, 2))),)),
    ]
    table = SteeringTable.for_model(config, num_slots=len(steerings) + 1, device=CPU)
    plan, _ = make_plan([(0, 13)] * len(steerings), list(steerings))
    inputs = build(plan, block_size=BLOCK_SIZE, steering=table, device=CPU).routing
    logits = torch.randn(13 * len(steerings), num_experts, generator=torch.Generator().manual_seed(4)) * 2
    logits[3::7] = logits[3::7].round()
    logits[5::11, 0] += 500
    for layer in range(config.num_layers):
        ours = backend.route(layer, logits, inputs, renormalize=renormalize, record=None)
        theirs = TopKSoftmax(num_experts, renormalize)(GateOutput(logits, None), layer, inputs)
        assert torch.equal(ours.expert_ids, theirs.expert_ids)
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-5, atol=1e-7)
