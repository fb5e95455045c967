"""Routing and grouping on the GPU against the softmax router, the record and a sort in a loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.backends.cuda.routing import ExpertBlocks, group_blocks, group_launch, one_program, route, route_launch
from engine.routing.base import GateOutput, Routing, RoutingInputs
from engine.routing.plan import group
from engine.routing.record import RoutingRecord
from engine.routing.topk_softmax import TopKSoftmax
from engine.types import Steering
from tests.engine.routing.inputs import CPU, make_inputs

pytestmark = pytest.mark.interpreter

GARBAGE = 123456
"""What integers hold before they are written."""

SIZES = [
    (1, 1, 1),
    (5, 1, 1),
    (3, 2, 1),
    (9, 2, 2),
    (17, 6, 2),
    (5, 6, 6),
    (1, 8, 2),
    (33, 8, 2),
    (16, 8, 8),
    (700, 8, 2),  # more than the program takes at a time
    (7, 60, 4),
    (70, 64, 6),
    (3, 64, 64),
    (40, 128, 8),
    (20, 200, 3),
]
"""T, E, K"""


def random_logits(num_tokens: int, num_experts: int, seed: int = 0) -> Tensor:
    """Uneven: experts differ more than tokens do, and some tokens are sure of theirs."""
    generator = torch.Generator().manual_seed(seed + 1000 * num_tokens + num_experts)
    favour = 2 * torch.randn(num_experts, generator=generator)
    return favour + torch.randn(num_tokens, num_experts, generator=generator) * 3


def reference(logits: Tensor, layer: int, inputs: RoutingInputs, *, renormalize: bool) -> Routing:
    """The router's answer, without padding."""
    routing = TopKSoftmax(logits.shape[1], renormalize)(GateOutput(logits, None), layer, inputs)
    valid = torch.arange(logits.shape[0]) < inputs.num_valid_tokens
    return Routing.keeping(valid.unsqueeze(-1), routing.expert_ids, routing.weights, logits)


def poisoned_blocks(expert_ids: Tensor, num_experts: int, block_m: int) -> ExpertBlocks:
    blocks = ExpertBlocks.empty(expert_ids, num_experts, block_m)
    blocks.sorted_ids.fill_(GARBAGE)
    blocks.block_experts.fill_(GARBAGE)
    return blocks


def new_record(num_tokens: int, num_experts: int, num_layers: int) -> RoutingRecord:
    record = RoutingRecord(num_layers=num_layers, num_experts=num_experts, top_k=1, max_tokens=num_tokens, device=CPU)
    for tensor in (record.logits, record.weights):
        tensor.fill_(torch.nan)
    for tensor in (record.expert_ids, record.chosen_ids):
        tensor.fill_(GARBAGE)
    return record


def launched(
    logits: Tensor,
    inputs: RoutingInputs,
    *,
    layer: int = 0,
    renormalize: bool = True,
    block_m: int = 16,
    record: RoutingRecord | None = None,
) -> tuple[Routing, ExpertBlocks]:
    """What one launch makes of poisoned outputs."""
    num_choices = min(inputs.max_top_k, logits.shape[1])
    expert_ids = torch.full((logits.shape[0], num_choices), GARBAGE, dtype=torch.int32)
    weights = torch.full(expert_ids.shape, torch.nan)
    routing = Routing(expert_ids, weights, logits, expert_ids)
    blocks = poisoned_blocks(expert_ids, logits.shape[1], block_m)
    route_launch(layer, inputs, routing, blocks, renormalize=renormalize, record=record).run()
    return routing, blocks


def assert_same(routing: Routing, expected: Routing) -> None:
    assert torch.equal(routing.expert_ids, expected.expert_ids)
    torch.testing.assert_close(routing.weights, expected.weights, rtol=2e-6, atol=1e-37)


def assert_grouped(blocks: ExpertBlocks, expert_ids: Tensor, num_experts: int) -> None:
    """`blocks` are those of `expert_ids` [T, K], by a loop."""
    flat = expert_ids.flatten().tolist()
    padding, block_m = len(flat), blocks.block_m
    sorted_ids, block_experts = [], []
    for expert in range(num_experts):
        own = [place for place, owner in enumerate(flat) if owner == expert]
        while own:
            sorted_ids += (own + [padding] * block_m)[:block_m]
            block_experts.append(expert)
            own = own[block_m:]
    num_blocks = min(len(flat), num_experts) + len(flat) // block_m
    unused = num_blocks - len(block_experts)
    assert blocks.block_experts.tolist() == block_experts + [-1] * unused
    assert blocks.sorted_ids.tolist() == sorted_ids + [padding] * (unused * block_m)
    assert blocks.sorted_ids.dtype == blocks.block_experts.dtype == torch.int32


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), SIZES)
def test_routing_equals_the_router(num_tokens: int, num_experts: int, top_k: int) -> None:
    inputs = make_inputs([None] * num_tokens, num_experts=num_experts, top_k=top_k)
    logits = random_logits(num_tokens, num_experts)
    for renormalize, block_m in ((True, 16), (False, 64)):
        routing, blocks = launched(logits, inputs, renormalize=renormalize, block_m=block_m)
        assert_same(routing, reference(logits, 0, inputs, renormalize=renormalize))
        assert_grouped(blocks, routing.expert_ids, num_experts)


@pytest.mark.parametrize(("num_tokens", "num_experts", "num_layers"), [(13, 6, 3), (600, 8, 2), (40, 60, 1)])
@pytest.mark.parametrize("renormalize", [True, False])
def test_every_row_has_its_own_steering(num_tokens: int, num_experts: int, num_layers: int, renormalize: bool) -> None:
    layer = num_layers - 1
    steerings = [
        None,
        Steering(experts_per_token=num_experts),
        Steering(experts_per_token=1),
        Steering(experts_per_token=4, min_p=0.1),
        Steering(min_p=1.0),
        Steering(forbidden=((layer, (0, 1, 2)), (None, (num_experts - 1,)))),
        Steering(experts_per_token=num_experts, forbidden=((layer, tuple(range(1, num_experts))),)),
    ]
    inputs = make_inputs(
        [steerings[t % len(steerings)] for t in range(num_tokens)],
        num_experts=num_experts,
        top_k=2,
        num_layers=num_layers,
        num_valid=num_tokens - 2,
    )
    logits = random_logits(num_tokens, num_experts)
    routing, blocks = launched(logits, inputs, layer=layer, renormalize=renormalize)
    expected = reference(logits, layer, inputs, renormalize=renormalize)
    assert len(set((expected.expert_ids >= 0).sum(-1).tolist())) > 3
    assert_same(routing, expected)
    assert_grouped(blocks, expected.expert_ids, num_experts)


@pytest.mark.parametrize("num_valid", [0, 1, 16, 30])
def test_padding_has_no_experts(num_valid: int) -> None:
    """Whatever its slots and gates hold."""
    inputs = make_inputs([None] * 30, num_experts=8, top_k=2, num_valid=num_valid)
    inputs.slots[num_valid:] = 1 << 40
    logits = random_logits(30, 8)
    logits[num_valid:, 3] = torch.nan
    routing, blocks = launched(logits, inputs)
    plain = make_inputs([None] * 30, num_experts=8, top_k=2, num_valid=num_valid)
    expected = reference(logits, 0, plain, renormalize=True)
    assert (expected.expert_ids[num_valid:] == -1).all()
    assert_same(routing, expected)
    assert_grouped(blocks, expected.expert_ids, 8)


def test_equals_go_to_the_lower_expert() -> None:
    """Also where probabilities are equal, being 0, and gates are not."""
    logits = torch.tensor([[1.0, 2, 2, 1, 2, 0], [0, 0, 0, 0, 0, 0], [0, -300, -200, -torch.inf, -250, -150]])
    inputs = make_inputs([None] * 3, num_experts=6, top_k=4)
    routing, _ = launched(logits, inputs, renormalize=False)
    assert routing.expert_ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert_same(routing, reference(logits, 0, inputs, renormalize=False))


def test_gates_that_are_not_finite() -> None:
    inf, nan = torch.inf, torch.nan
    rows = [
        [nan, 1, 2, 3],
        [1, 2, nan, 3],
        [inf, 1, 2, 3],
        [inf, inf, -inf, 0],
        [-inf, 1, -inf, 0],
        [-inf, -inf, -inf, -inf],
        [-inf, -inf, -inf, 5],
        [1.5e38, -1.5e38, 1.5e38, 0],
    ]
    mask = Steering(forbidden=((None, (2,)),))
    nobody = Steering(forbidden=((None, (0, 1, 2, 3)),))
    steerings = [*[None] * len(rows), *[mask] * len(rows), nobody]
    logits = torch.tensor([*rows, *rows, [1, 2, 3, 4]])
    inputs = make_inputs(steerings, num_experts=4, top_k=3)
    for renormalize in (True, False):
        routing, blocks = launched(logits, inputs, renormalize=renormalize)
        expected = reference(logits, 0, inputs, renormalize=renormalize)
        assert expected.expert_ids[0].tolist() == [-1, -1, -1]
        assert expected.expert_ids[9].tolist() == [3, 1, 0]
        assert_same(routing, expected)
        assert_grouped(blocks, expected.expert_ids, 4)


def test_gates_in_half_precision() -> None:
    """Few different values, so that equals are many; and one that overflowed."""
    inputs = make_inputs([None] * 50, num_experts=8, top_k=2)
    logits = random_logits(50, 8).round().half()
    logits[3, 2] = 1e6
    routing, _ = launched(logits, inputs)
    assert_same(routing, reference(logits, 0, inputs, renormalize=True))
    assert routing.expert_ids[3].tolist() == [-1, -1]


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(5, 6, 3), (600, 8, 2), (3, 128, 8)])
def test_the_record_is_written(num_tokens: int, num_experts: int, top_k: int) -> None:
    """The rows of this step in one layer, the columns that are chosen from, and nothing else."""
    sharp = Steering(min_p=0.5)
    inputs = make_inputs(
        [sharp if t % 3 == 0 else None for t in range(num_tokens)],
        num_experts=num_experts,
        top_k=top_k,
        num_layers=3,
        num_valid=num_tokens - 1,
    )
    logits = random_logits(num_tokens, num_experts)
    logits[0, 1] = torch.nan
    record, expected = (new_record(num_tokens + 3, num_experts, 3) for _ in range(2))
    routing, _ = launched(logits, inputs, layer=1, record=record)
    expected.write(1, routing)
    assert torch.equal(record.expert_ids, expected.expert_ids)
    assert torch.equal(record.chosen_ids, expected.chosen_ids)
    torch.testing.assert_close(record.weights, expected.weights, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(record.logits, expected.logits, rtol=0, atol=0, equal_nan=True)
    assert_same(routing, reference(logits, 1, inputs, renormalize=True))


def test_the_example() -> None:
    expert_ids = torch.tensor([[2, 0], [0, -1], [2, 1]], dtype=torch.int32)
    blocks = group_blocks(expert_ids, 3, 2)
    assert blocks.sorted_ids.tolist() == [1, 2, 5, 6, 0, 4, 6, 6, 6, 6, 6, 6]
    assert blocks.block_experts.tolist() == [0, 1, 2, -1, -1, -1]


def check_groups(expert_ids: Tensor, num_experts: int, block_m: int) -> None:
    """By the kernel, and in the order of `group`."""
    blocks = poisoned_blocks(expert_ids, num_experts, block_m)
    group_launch(expert_ids, num_experts, blocks).run()
    assert_grouped(blocks, expert_ids, num_experts)
    plan = group(expert_ids, num_experts)
    used = blocks.sorted_ids[blocks.sorted_ids < expert_ids.numel()]
    assert torch.equal(used // expert_ids.shape[1], plan.token_indices[: used.numel()].int())
    assert torch.equal(plan.inverse[used], torch.arange(used.numel()))
    for expert, own in enumerate(plan.offsets.diff().tolist()):
        assert int((blocks.block_experts == expert).sum()) == -(-own // block_m)


@pytest.mark.parametrize(
    ("expert_ids", "num_experts"),
    [
        (torch.zeros(1, 1), 1),
        (torch.full((3, 2), -1), 4),
        (torch.full((40, 1), 7), 8),
        (torch.full((600, 2), 7), 8),  # twice in a row, too
        (torch.arange(64).view(32, 2), 64),
        (torch.arange(50).view(50, 1) % 2 * 8 - 1, 8),
        (torch.randint(-1, 128, (90, 8), generator=torch.Generator().manual_seed(1)), 128),
        (torch.randint(-1, 6, (1000, 3), generator=torch.Generator().manual_seed(2)), 6),
    ],
)
def test_groups_at_the_edge(expert_ids: Tensor, num_experts: int) -> None:
    for block_m in (16, 128):
        check_groups(expert_ids.int(), num_experts, block_m)


@st.composite
def choices(draw: st.DrawFn) -> tuple[Tensor, int]:
    num_experts = draw(st.integers(1, 9))
    expert = st.one_of(st.integers(-1, num_experts - 1), st.sampled_from([-1, 0, num_experts - 1]))
    width = draw(st.integers(1, 4))
    rows = draw(st.lists(st.lists(expert, min_size=width, max_size=width), min_size=1, max_size=12))
    return torch.tensor(rows, dtype=torch.int32), num_experts


@settings(max_examples=60, deadline=None, derandomize=True)
@given(choices(), st.sampled_from([1, 2, 4, 16]))
def test_random_groups(choice: tuple[Tensor, int], block_m: int) -> None:
    check_groups(*choice, block_m)


@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(9000, 8, 2), (300, 64, 7), (5, 300, 2)])
def test_what_is_too_much_for_one_program(num_tokens: int, num_experts: int, top_k: int) -> None:
    """Torch does it, with the same result and without looking at values, which tensors on "meta" do not have."""
    assert not one_program(num_tokens, top_k, num_experts)
    steerings = [Steering(experts_per_token=1 + t % top_k) if t < 9 else None for t in range(num_tokens)]
    inputs = make_inputs(steerings[:9], num_experts=num_experts, top_k=top_k, num_layers=2)
    slots = torch.zeros(num_tokens, dtype=torch.int64)
    slots[: len(inputs.slots)] = inputs.slots
    inputs = replace(inputs, slots=slots, num_valid_tokens=torch.tensor(num_tokens - 3))
    logits = random_logits(num_tokens, num_experts)
    record = new_record(num_tokens, num_experts, 2)
    routing, blocks = route(logits, 1, inputs, renormalize=True, block_m=16, record=record)
    expected, expected_blocks = launched(logits, inputs, layer=1)
    assert_same(routing, expected)
    assert routing.chosen_ids is routing.expert_ids
    assert torch.equal(record.weights[1, :, :top_k], routing.weights)
    assert torch.equal(blocks.sorted_ids, expected_blocks.sorted_ids)
    assert torch.equal(blocks.block_experts, expected_blocks.block_experts)
    read = {
        name: getattr(inputs, name).to("meta") for name in ("num_valid_tokens", "slots", "top_k", "min_p", "forbidden")
    }
    route(logits.to("meta"), 1, replace(inputs, **read), renormalize=True, block_m=16, record=None)
