"""Made-up routing: a token's experts depend on its id and the layer alone."""

from __future__ import annotations

from collections.abc import Sequence

from engine.types import CapacityWhatIf, EngineInfo, ExpertReport, LayerRouting, Request, RoutingStats, TokenRouting


def fake_routing(token_id: int, info: EngineInfo, top_k: int = 2) -> TokenRouting:
    """Experts token, token + 1, … (mod E), one further in every layer, with numbers of many decimals."""
    return TokenRouting(
        expert_ids=tuple(
            tuple((token_id + layer + place) % info.num_experts for place in range(top_k))
            for layer in range(info.num_layers)
        ),
        weights=tuple(tuple(2 / 3 / 2**place for place in range(top_k)) for _ in range(info.num_layers)),
        entropy=tuple(1.23456789 + layer for layer in range(info.num_layers)),
    )


def top_k_of(request: Request, info: EngineInfo) -> int:
    return (request.steering and request.steering.experts_per_token) or info.num_experts_per_tok


def fake_report(rows: Sequence[TokenRouting], info: EngineInfo) -> ExpertReport:
    """Of these tokens; each layer dropped one assignment more than it has as its number."""
    stats = fake_stats(rows, info)
    return ExpertReport(
        router=info.router,
        num_experts=info.num_experts,
        num_experts_per_tok=info.num_experts_per_tok,
        capacity_factor=info.capacity_factor,
        simulation=info.routing_simulation,
        window=stats,
        total=stats,
        recomputed_tokens=5,
    )


def fake_stats(rows: Sequence[TokenRouting], info: EngineInfo) -> RoutingStats:
    layers = []
    for layer in range(info.num_layers):
        chosen = [expert for row in rows for expert in row.expert_ids[layer]]
        dispatched = tuple(chosen.count(expert) for expert in range(info.num_experts))
        dropped = layer + 1 if rows else 0
        layers.append(
            LayerRouting(
                assigned=(dispatched[0] + dropped, *dispatched[1:]),
                dispatched=dispatched,
                dropped=dropped,
                max_over_mean=1.5 + layer,
                coefficient_of_variation=0.25 + layer,
                entropy=1.0 + layer,
                entropy_share=0.5,
                auxiliary_loss=1.125 + layer,
                mean_probability=(1 / info.num_experts,) * info.num_experts,
                effective_batch=2.5 + layer,
                distinct_experts=3.5 + layer,
            )
        )
    return RoutingStats(tokens=len(rows), steps=len(rows), pooled_auxiliary_loss=2.25, layers=tuple(layers))


def fake_what_if(capacity_factor: float, info: EngineInfo) -> CapacityWhatIf:
    """One assignment over in the first layer for each expert's number; twice that and one since start."""
    window = tuple(
        tuple(expert * (layer == 0) for expert in range(info.num_experts)) for layer in range(info.num_layers)
    )
    return CapacityWhatIf(
        capacity_factor=capacity_factor,
        window_steps=3,
        window_assigned=100,
        window_overflow=window,
        total_capacity_factor=1.25,
        total_assigned=400,
        total_overflow=tuple(tuple(2 * value + 1 for value in layer) for layer in window),
    )
