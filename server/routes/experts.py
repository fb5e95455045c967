"""GET /v1/experts and what is under it: how evenly the experts work, now and every second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Query, Response

from engine.types import CapacityWhatIf, ExpertReport
from server.json_io import JsonResponse
from server.openapi import responses, stream_of
from server.protocol import fields
from server.protocol.live import LiveEvent
from server.protocol.routing import Overflow, WhatIf
from server.protocol.status import Reset
from server.service import Service
from server.stream import EventStream

_FACTOR = "Tokens that an expert would take of a batch, over an even share."


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get("/v1/experts", summary="How evenly the experts work", responses=responses(ExpertReport, 400))
    async def experts() -> Response:
        return JsonResponse(await service.experts.report())

    @routes.get(
        "/v1/experts/events",
        summary="What the server does, once a second",
        response_class=Response,
        responses=stream_of(LiveEvent),
    )
    async def events() -> Response:
        listener = service.feed.listen()
        return EventStream(listener.events(), listener.close)

    @routes.get(
        "/v1/experts/what_if", summary="What a capacity limit would have dropped", responses=responses(WhatIf, 400)
    )
    async def what_if(capacity_factor: Annotated[fields.CapacityFactor, Query(description=_FACTOR)]) -> Response:
        found = await service.experts.what_if(capacity_factor)
        answer: WhatIf = {
            "capacity_factor": found.capacity_factor,
            "window_steps": found.window_steps,
            "window": _overflow(found.window_overflow, found.window_assigned, found, found.capacity_factor),
            "total": _overflow(found.total_overflow, found.total_assigned, found, found.total_capacity_factor),
        }
        return JsonResponse(answer)

    @routes.post("/v1/experts/reset", summary="Start the totals anew", responses=responses(Reset, 400))
    async def reset() -> Response:
        await service.experts.reset()
        answer: Reset = {"status": "reset"}
        return JsonResponse(answer)

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
