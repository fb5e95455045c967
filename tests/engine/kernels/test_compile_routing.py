"""Routing and grouping compile for every size of chunk, and keep all they hold in registers."""

from __future__ import annotations

import pytest
import torch

from engine.backends.cuda.routing import ExpertBlocks, group_launch, route_launch
from engine.routing.base import Routing, RoutingInputs
from engine.routing.record import RoutingRecord
from tests.engine.kernels.compile import assert_fits, compiled

META = torch.device("meta")


def make_inputs(num_tokens: int, top_k: int, num_experts: int) -> RoutingInputs:
    def integers(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int64, device=META)

    return RoutingInputs(
        num_valid_tokens=integers(),
        slots=integers(num_tokens),
        top_k=integers(257),
        min_p=torch.empty(257, device=META),
        forbidden=torch.empty(257, 32, num_experts, dtype=torch.bool, device=META),
        seeds=integers(num_tokens),
        positions=integers(num_tokens),
        max_top_k=top_k,
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts", "dtype"),
    [
        (1, 2, 8, torch.float32),
        (32, 2, 8, torch.bfloat16),
        (128, 2, 8, torch.float32),
        (512, 8, 8, torch.float32),
        (512, 1, 1, torch.float32),
        (64, 8, 60, torch.float32),
        (64, 8, 128, torch.float16),
        (64, 8, 256, torch.float32),
    ],
)
def test_routing(capability: int, num_tokens: int, top_k: int, num_experts: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(num_tokens, top_k, num_experts)
    logits = torch.empty(num_tokens, num_experts, dtype=dtype, device=META)
    expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=META)
    routing = Routing(expert_ids, torch.empty(num_tokens, top_k, device=META), logits, expert_ids)
    blocks = ExpertBlocks.empty(expert_ids, num_experts, 16)
    record = RoutingRecord(num_layers=32, num_experts=num_experts, top_k=top_k, max_tokens=8192, device=META)
    with_record = compiled(route_launch(3, inputs, routing, blocks, renormalize=True, record=record), capability)
    assert_fits(with_record, capability)
    assert_fits(compiled(group_launch(expert_ids, num_experts, blocks), capability), capability)
    if num_tokens == 1:
        bare = compiled(route_launch(3, inputs, routing, blocks, renormalize=False, record=None), capability)
        assert_fits(bare, capability)
        assert bare.sass.count("STG") < with_record.sass.count("STG")
