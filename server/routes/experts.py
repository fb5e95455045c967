"""GET /v1/experts, GET /v1/experts/what_if and POST /v1/experts/reset: how evenly the experts work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Response

from engine.types import CapacityWhatIf, ExpertReport
from server.json_io import JsonResponse
from server.protocol import fields
from server.protocol.routing import Overflow, WhatIf
from server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/experts", responses={200: {"model": ExpertReport}})
    async def experts() -> Response:
        return JsonResponse(await service.experts.report())

    @routes.get("/v1/experts/what_if", responses={200: {"model": WhatIf}})
    async def what_if(capacity_factor: Annotated[fields.CapacityFactor, Query()]) -> Response:
        found = await service.experts.what_if(capacity_factor)
        answer: WhatIf = {
            "capacity_factor": found.capacity_factor,
            "window_steps": found.window_steps,
            "window": _overflow(found.window_overflow, found.window_assigned, found, found.capacity_factor),
            "total": _overflow(found.total_overflow, found.total_assigned, found, found.total_capacity_factor),
        }
        return JsonResponse(answer)

    @routes.post("/v1/experts/reset")
    async def reset() -> Response:
        await service.experts.reset()
        return JsonResponse({"status": "reset"})

    return routes


def _overflow(
    by_expert: Sequence[Sequence[int]], assigned: int, found: CapacityWhatIf, capacity_factor: float
) -> Overflow:
    """`capacity_factor` is the one that `by_expert` is exact for."""
    by_layer = [sum(layer) for layer in by_expert]
    return {
        "exact": capacity_factor == found.capacity_factor,
        "capacity_factor": capacity_factor,
        "assigned": assigned,
        "overflow": sum(by_layer),
        "overflow_share": sum(by_layer) / max(assigned, 1),
        "by_layer": by_layer,
        "by_expert": [list(layer) for layer in by_expert],
    }
