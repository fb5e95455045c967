"""GET /metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from server.service import Service


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        text = service.metrics.render(await service.experts.scrape())
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    return routes
